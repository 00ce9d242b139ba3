"""Texts that are far too long, without the part of their prompt that would be cut anyway.

``--overlong truncate`` keeps the last tokens of a prompt. To find them, all of it would be encoded, which takes minutes
for 50 MB. A prompt of more than :data:`AT_LEAST` times as many characters as the context could take is therefore
encoded without its middle: its beginning, where special tokens stand, and so much of its end that the tokens which are
kept are those of the whole.

For tokenizers that split a text at spaces (:func:`tether.data.encoding.splits_at_spaces`) they are the same because the
end begins at a space between two words. For others the end holds twice the tokens that may be kept: a word that was
cut in two changes tokens near it, which are not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from transformers import PreTrainedTokenizerBase

from tether.data.encoding import BOUNDARY, FEW, LEAST, Written, encode_batch
from tether.data.loading import Overlong
from tether.data.texts import common
from tether.data.tokenise import Continuation

AT_LEAST = 4
"""A text of at most so many times ``FEW`` characters per token of the context is encoded whole."""
HEAD = 64
"""Characters of the beginning, at least."""

Shorten = Callable[[str], str]


def shortening(tokenizer: PreTrainedTokenizerBase, context: int, overlong: Overlong) -> Shorten:
    """What shortens the prompts of rows: :func:`without_middle` where they are cut, else nothing."""
    return partial(without_middle, tokenizer, context) if overlong == "truncate" else whole


def whole(text: str) -> str:
    return text


def without_middle(tokenizer: PreTrainedTokenizerBase, tokens: int, text: str) -> str:
    """``text``, or its beginning and its end where the end alone has more than twice as many ``tokens``.

    The time does not depend on the length of the text, unless its end has few tokens, as white space that a tokenizer
    leaves out.
    """
    size = max(LEAST, FEW * tokens)
    if len(text) <= AT_LEAST * size:
        return text
    found = BOUNDARY.search(text, HEAD, size)
    head = text[: found.start() if found else size]
    while 2 * size < len(text):
        begin = len(text) - size
        found = BOUNDARY.search(text, begin, begin + size // 2)
        end = text[found.start() if found else begin :]
        if len(encode_batch(tokenizer, [end], special=False)[0]) > 2 * tokens:
            return head + end
        size *= 4
    return text


def shorter_prompt(written: Continuation, shorten: Shorten) -> Continuation:
    """A prompt and its completion, with the prompt shortened in both texts."""
    prompt = shorten(written.opened.text)
    if prompt == written.opened.text:
        return written
    return Continuation(written.opened._replace(text=prompt), written.closed._replace(text=prompt + written.tail))


def shorter_front(wholes: tuple[Written, Written], shorten: Shorten) -> tuple[tuple[Written, Written], tuple[str, str]]:
    """Two texts whose prompt is what both begin with, that shortened, and the rest of each, which is never cut."""
    first, second = (one.text for one in wholes)
    if shorten is whole:
        return wholes, (first, second)
    same = common(first, second)
    front, rests = shorten(first[:same]), (first[same:], second[same:])
    if len(front) == same:
        return wholes, rests
    return (wholes[0]._replace(text=front + rests[0]), wholes[1]._replace(text=front + rests[1])), rests
