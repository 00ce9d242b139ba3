"""Whether two processes write the same ids, without either having the other's tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tether.data.tokenise import encode
from tether.digests import digest

PROBE = "Two words, 12 (more)?\n\n caf\u00e9 "
"""Text on which tokenizers of one vocabulary differ where they differ in BOS, merges or white space."""


@dataclass(frozen=True)
class Signature:
    """What decides the ids that a tokenizer gives, as digests."""

    size: int
    """The number of its ids. A tokenizer that has more ids behind them, such as one for padding, can have the same
    signature of this size."""
    text: str
    """Of plain text: the vocabulary, EOS, and the ids of :data:`PROBE`."""
    conversations: str
    """Of conversations: the vocabulary, EOS, the chat template, and the special tokens that it may write by name."""


def special_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str | None, ...]:
    """The special tokens that a chat template may write by name."""
    return tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token


def signature_of(tokenizer: PreTrainedTokenizerBase, size: int | None = None) -> Signature:
    """The signature of a tokenizer, of its ids below ``size``, or of all."""
    vocabulary = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    known = vocabulary[-1][0] + 1 if size is None else size
    common = digest([[pair for pair in vocabulary if pair[0] < known], tokenizer.eos_token_id])
    return Signature(
        size=known,
        text=digest([common, encode(tokenizer, PROBE)]),
        conversations=digest([common, tokenizer.chat_template, special_texts(tokenizer)]),
    )
