"""Work that is split until it fits into memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from tether.errors import MemoryShortError

T = TypeVar("T")

UNTYPED = ("can't allocate memory", "could not create a primitive", "could not create a memory object")
"""Texts of the plain RuntimeErrors of torch's CPU allocator and of oneDNN, which multiplies bfloat16 on a CPU."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on CUDA, in Python or on a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in UNTYPED)
    )


def alone(short: bool) -> bool:
    """Whether memory ran out on one rank."""
    return short


def within_memory(
    attempt: Callable[[int], T], budget: int, *, least: int = 1, agree: Callable[[bool], bool] = alone
) -> tuple[T, int]:
    """``(attempt(budget), budget)``, with the budget halved each time memory runs out.

    ``attempt`` starts over each time. Raises :class:`MemoryShortError` where ``least`` does not fit either.
    """
    while True:
        found: list[T] = []
        reason = "on another rank"
        try:
            found.append(attempt(budget))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            reason = (str(error).splitlines() or ["no more memory"])[0]
        # out of the handler, where the error no longer holds on to the tensors of what failed
        if not agree(not found):
            return found[0], budget
        if budget <= least:
            raise MemoryShortError(f"out of memory, however little is computed at a time ({reason})")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        budget = max(least, budget // 2)
