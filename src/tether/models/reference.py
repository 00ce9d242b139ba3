"""The reference policy pi_ref."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedModel

from tether.errors import ConfigError
from tether.models.loading import embedding_rows


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


def as_reference(reference: Reference | PreTrainedModel, policy: PreTrainedModel) -> Reference:
    """A ``reference`` for the training of ``policy``; a model is frozen where it is, not copied.

    Raises :class:`ConfigError` where it is no reference, has weights that are the policy's, which would be trained with
    it, or lacks an embedding for an id that the policy may emit.
    """
    if not isinstance(reference, PreTrainedModel):
        if not callable(getattr(reference, "model", None)):
            raise ConfigError(f"the reference must be a model or a Reference, found {reference!r}")
        return reference
    own = {weight.data_ptr() for weight in policy.parameters()}
    if any(weight.data_ptr() in own for weight in reference.parameters()):
        raise ConfigError(
            "the reference has the policy's own weights, which training changes",
            hint="give reference_of(policy), a frozen copy of it as it is now",
        )
    if embedding_rows(reference) < embedding_rows(policy):
        raise ConfigError(
            f"the reference has embeddings for {embedding_rows(reference)} ids, and the policy may emit "
            f"{embedding_rows(policy)}"
        )
    return FrozenCopy(reference.requires_grad_(False).eval())
