"""Ids of whole rows, put together as the loaders do."""

from __future__ import annotations

from tether.data.tokenise import Encoder, continuation_ids, whole_ids, write_continuation, write_whole


def encode_whole(tokenizer, text) -> list[int]:
    """Ids of a text that holds prompt and completion, ending with EOS."""
    return whole_ids(Encoder(tokenizer), write_whole(tokenizer, text))


def encode_continuation(tokenizer, prompt, completion) -> tuple[list[int], list[int]]:
    """``(prompt ids, completion ids)``; the completion ends with EOS."""
    return continuation_ids(Encoder(tokenizer), write_continuation(tokenizer, prompt, completion))
