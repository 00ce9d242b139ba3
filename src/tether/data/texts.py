"""What two texts begin with."""

from __future__ import annotations

REPEATED = 20
"""Characters from which a beginning that the texts of a row share is taken to be its prompt, not chance."""


def common(a: str, b: str) -> int:
    """Characters that both texts begin with."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # by halves, because a loop over the characters of a large text takes seconds
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
