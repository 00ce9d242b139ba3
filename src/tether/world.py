"""The ranks that share a step, as an algorithm sees them.

An algorithm holds its own rank's rows. Whatever belongs to the whole step goes through a :class:`World`: denominators,
batch statistics, gradients, metrics, and whether any rank had a value that was not finite, ran out of memory or was
asked to stop.
:data:`ALONE` is one process, where all of it is the identity.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from torch import Tensor

T = TypeVar("T")
Number = TypeVar("Number", int, float, Tensor)


class World(Protocol):
    """Collective calls: every rank makes the same ones in the same order."""

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        ...

    @property
    def size(self) -> int: ...

    def sum(self, value: Number) -> Number:
        """The sum over ranks; a tensor is summed element by element, into a new one."""
        ...

    def max(self, value: Number) -> Number: ...

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is True on any rank."""
        ...

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in the order of ranks."""
        ...


class Alone:
    """A :class:`World` of one process."""

    rank, size = 0, 1

    def sum(self, value: Number) -> Number:
        return value

    def max(self, value: Number) -> Number:
        return value

    def any(self, flag: bool) -> bool:
        return flag

    def gather(self, value: T) -> list[T]:
        return [value]


ALONE = Alone()
