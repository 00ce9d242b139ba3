"""The reference policy pi_ref."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedModel


class Reference(Protocol):
    """Provides the reference as a model: a frozen copy, or weights shared with the policy that are the reference's only
    inside the block."""

    def model(self) -> AbstractContextManager[PreTrainedModel]:
        """The reference, to run without gradient inside the block; the policy must not run there."""
        ...


@dataclass(frozen=True)
class FrozenCopy:
    """A :class:`Reference` with weights of its own."""

    frozen: PreTrainedModel

    @contextmanager
    def model(self) -> Iterator[PreTrainedModel]:
        yield self.frozen


def reference_of(policy: PreTrainedModel) -> Reference:
    """A reference that is a frozen copy of the current policy."""
    return FrozenCopy(copy.deepcopy(policy).requires_grad_(False).eval())
