"""Token ids of many texts: each distinct text once, and in batches."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

CACHED = 2**22
"""Characters of words whose ids are remembered."""
FEW, LEAST = 16, 4096
"""A text of over ``FEW`` characters per token of the context, and over ``LEAST``, is first encoded in part."""

BOUNDARY = re.compile(r" (?=\S)(?<=\S )")
"""A space between two other characters."""
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = {
    _CONTRACTIONS, "'s", "'t", "'re", "'ve", "'m", "'ll", "'d",
    r" ?\p{L}+", r" ?\p{N}+", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"\p{N}{1,3}", r"\p{N}",
    r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", r"\s*[\r\n]+", r"\s*[\r\n]",
    r"\s+(?!\S)", r"\s+",
}  # fmt: skip
"""Alternatives of the patterns that GPT-2, Llama 3, Qwen and their like split text with. None of them matches a space
between two other characters together with what is before it."""


class Written(NamedTuple):
    """A text to encode. ``special`` puts the tokenizer's special tokens around it, of which a trailing EOS is removed
    and a BOS that the text spells out itself is not doubled; the output of a chat template has its own."""

    text: str
    special: bool


class Encoder:
    """``encoder(written)`` gives the token ids of a text; those of texts given to :meth:`prepare` are ready."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, by_words: bool = False) -> None:
        """``by_words`` needs a tokenizer that :func:`splits_at_spaces`, and is fast where words return."""
        self.tokenizer = tokenizer
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id  # which the tokenizer looks up each time
        self._ready: dict[Written, list[int]] = {}
        self._by_words = by_words
        self._first: dict[str, list[int]] = {}
        """Ids of the first words of texts."""
        self._others: dict[str, list[int]] = {}
        """Ids of words with a space in front."""
        self._remembered = 0
        self._integers: dict[int, int] = {}
        if self._by_words:
            around = tokenizer("a")["input_ids"]
            start = around.index(tokenizer("a", add_special_tokens=False)["input_ids"][0])
            self._around = around[:start], around[start + 1 :]

    def prepare(self, texts: Iterable[Written]) -> None:
        """Encode ``texts`` together; those prepared before are forgotten."""
        distinct = list(dict.fromkeys(texts))
        self._ready = {}
        for special in (True, False):
            some = [one for one in distinct if one.special == special]
            self._ready.update(zip(some, self._encode([one.text for one in some], special), strict=True))

    def __call__(self, written: Written) -> list[int]:
        if written not in self._ready:
            self._ready[written] = self._encode([written.text], written.special)[0]
        return self._ready[written]

    def certainly_longer(self, text: str, tokens: int) -> bool:
        """Whether ``text`` takes more than ``tokens`` tokens, as far as its beginning shows it without doubt.

        The last word of the beginning may be cut in two, and take more tokens than it would as a whole: twice the
        limit is beyond that.
        """
        few = max(LEAST, FEW * tokens)
        while 2 * few < len(text):
            if len(encode_batch(self.tokenizer, [text[:few]], special=False)[0]) > 2 * tokens:
                return True
            few *= 4
        return False

    def _encode(self, texts: list[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        if not self._by_words:
            batch = encode_batch(self.tokenizer, texts, special=special)
            # one object per id, or most of the memory would be equal integers
            found = [list(map(self._integers.setdefault, ids, ids)) for ids in batch]
        else:
            found = self._encode_words(texts)
            if special:
                front, back = self._around
                found = [[*front, *ids, *back] for ids in found]
        return [self._trimmed(ids) for ids in found] if special else found

    def _trimmed(self, ids: list[int]) -> list[int]:
        """``ids`` without a second BOS in front, and without an EOS at the end."""
        start = 1 if ids[:2] == [self.bos] * 2 else 0
        end = len(ids) - (len(ids) - start > 1 and ids[-1] == self.eos)
        return ids[start:end]

    def _encode_words(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts, word by word: a word that is known is not encoded again."""
        split = [BOUNDARY.split(text) for text in texts]
        if self._remembered > CACHED:
            self._first, self._others, self._remembered = {}, {}, 0
        self._learn(self._first, {words[0] for words in split}, "")
        self._learn(self._others, {word for words in split for word in words[1:]}, " ")
        others, found = self._others, []
        for words in split:
            ids = [*self._first[words[0]]]
            for word in words[1:]:
                ids += others[word]
            found.append(ids)
        return found

    def _learn(self, known: dict[str, list[int]], words: set[str], front: str) -> None:
        new = list(words - known.keys())
        if new:
            known.update(zip(new, encode_batch(self.tokenizer, [front + word for word in new], False), strict=True))
            self._remembered += sum(map(len, new))


def splits_at_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the ids of a text are those of its parts, cut before every space between two other characters.

    True for byte-level BPE with the usual patterns, where it can be proved; False where it cannot, and for added tokens
    that hold white space or take it from beside them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    made = json.loads(backend.to_str())
    before, model = made["pre_tokenizer"] or {}, made["model"]
    steps = before.get("pretokenizers", [before])
    normalizer = made["normalizer"] or {"type": "NFC"}
    return (
        model["type"] == "BPE"
        and not model.get("dropout")
        and normalizer["type"] == "NFC"
        and all(map(_is_harmless, steps))
        and any(step.get("type") == "Split" or step.get("use_regex") for step in steps)
        and not any(_takes_space(token) for token in made["added_tokens"])
        and _is_wrapped(tokenizer)
    )


def _is_harmless(step: dict[str, object]) -> bool:
    """Whether a step of the pre-tokenizer never joins what is on both sides of a space between two characters."""
    if step.get("type") == "ByteLevel":
        return not step["add_prefix_space"]
    if step.get("type") == "Digits":
        return True
    pattern = step.get("pattern")
    if step.get("type") != "Split" or not isinstance(pattern, dict) or step.get("behavior") != "Isolated":
        return False
    regex = str(pattern.get("Regex", ""))
    front = _CONTRACTIONS if regex.startswith(_CONTRACTIONS) else ""
    return bool(regex) and _WORDS.issuperset(regex[len(front) :].removeprefix("|").split("|"))


def _takes_space(token: dict[str, object]) -> bool:
    """Whether an added token may take a space between two other characters."""
    content = str(token["content"])
    only_spaces = len(content) > 1 and not content.strip()  # of which two are never such a space
    odd = token["lstrip"] or token["rstrip"] or token["single_word"] or content.split() != [content]
    return bool(odd) and not only_spaces


def _is_wrapped(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether special tokens go around a text and change nothing in it."""
    for text in ("a", "a b"):
        inner, whole = (encode_batch(tokenizer, [text], special=special)[0] for special in (False, True))
        if (text == "a" and len(inner) != 1) or not any(
            whole[i : i + len(inner)] == inner for i in range(len(whole) - len(inner) + 1)
        ):
            return False
    return True


def encode_batch(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool) -> list[list[int]]:
    made = tokenizer(
        list(texts),
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return list(made["input_ids"])
