"""The reference policy pi_ref."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from tether.errors import ConfigError
from tether.models.adapters import adapter_off, changes_nothing, is_adapted
from tether.models.loading import embedding_rows
from tether.models.trainable import trainable


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


@dataclass(frozen=True)
class AdapterOff:
    """A :class:`Reference` that is the policy without its adapter."""

    policy: PreTrainedModel

    def model(self) -> AbstractContextManager[PreTrainedModel]:
        return adapter_off(self.policy)


@dataclass(frozen=True)
class FormerAdapter:
    """A :class:`Reference` that is the policy with its adapter as it once was."""

    policy: PreTrainedModel
    former: Mapping[str, Tensor]
    """By the names of :func:`tether.models.trainable.trainable`."""

    @contextmanager
    def model(self) -> Iterator[PreTrainedModel]:
        own = trainable(self.policy)
        now = {name: weight.data for name, weight in own.items()}
        try:
            for name, weight in own.items():
                weight.requires_grad_(False)
                weight.data = self.former[name]
            yield self.policy
        finally:
            for name, weight in own.items():
                weight.data = now[name]
                weight.requires_grad_(True)


def reference_of(policy: PreTrainedModel) -> Reference:
    """A reference that is the current policy: a frozen copy, or for a policy with an adapter its own weights with the
    adapter off, if that changes nothing yet, or as it is now."""
    if is_adapted(policy):
        if changes_nothing(policy):
            return AdapterOff(policy)
        return FormerAdapter(policy, {name: weight.detach().clone() for name, weight in trainable(policy).items()})
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
