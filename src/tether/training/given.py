"""What a run is given as Python objects. Among its options, and in ``config.yaml``, a text stands for each of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tether.algorithms.optimise import OptimizerFactory
from tether.data.memory import Rows
from tether.environments.loading import Make
from tether.rewards.combine import Reward

OPTIMIZER = "optimizer"
"""Among the fingerprints of a run: the optimizer that it was given."""
_DESCRIBED = re.compile(r"<.+ given in Python>")


def described(what: str) -> str:
    """The text that stands for ``what``.

    >>> described("prompts")
    '<prompts given in Python>'
    """
    return f"<{what} given in Python>"


def is_described(value: Any) -> bool:
    """Whether the value of an option stands for a Python object."""
    values: Iterable[Any] = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(one, str) and _DESCRIBED.search(one) is not None for one in values)


@dataclass(frozen=True, kw_only=True)
class Given:
    """The Python objects of a run, by the texts that stand for them."""

    rows: Mapping[str, Rows] = field(default_factory=dict)
    rewards: Mapping[str, Callable[..., Any] | Reward] = field(default_factory=dict)
    environments: Mapping[str, Make] = field(default_factory=dict)
    shown: Mapping[str, Any] = field(default_factory=dict)
    """Options of which ``config.yaml`` has another value than the run: what stands for a model in memory."""
    optimizer: OptimizerFactory | None = None
    optimizer_name: str = ""

    @property
    def fingerprints(self) -> dict[str, str]:
        """What a resumed run must be given again."""
        return {OPTIMIZER: self.optimizer_name} if self.optimizer is not None else {}


NOTHING = Given()
