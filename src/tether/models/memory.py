"""Work that shrinks until it fits into memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from tether.errors import MemoryShortError

T = TypeVar("T")


UNTYPED = ("can't allocate memory", "could not create a primitive", "could not create a memory object")
"""What torch's CPU allocator and oneDNN, which multiplies bfloat16 on a CPU, say in a plain RuntimeError."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on CUDA, in Python or on a CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in UNTYPED)
    )


def within_memory(attempt: Callable[[int], T], budget: int, *, least: int = 1) -> tuple[T, int]:
    """``attempt(budget)``, with half the budget each time that memory runs out; also gives the budget that fitted.

    ``attempt`` has to begin anew each time. Raises :class:`MemoryShortError` where ``least`` does not fit either.
    """
    while True:
        try:
            return attempt(budget), budget
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if budget <= least:
                reason = (str(error).splitlines() or ["no more memory"])[0]
                raise MemoryShortError(f"out of memory, however little is computed at a time ({reason})") from error
        # out of the handler, where the error no longer holds on to the tensors of what failed
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        budget = max(least, budget // 2)
