"""Which trackers there are, and whether what they need is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Literal

from tether.errors import ConfigError

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]

NEEDED: Mapping[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "mlflow": ("mlflow", "pandas"),
}
"""The packages that each of them imports; the extra that installs them has the tracker's name."""

THREAD = "tether-tracker-"
"""How the names of the trackers' threads begin. One that is alive when a run is over hangs."""


def require_installed(names: Sequence[TrackerName]) -> None:
    """Raise :class:`ConfigError` for the first tracker that lacks a package."""
    for name in names:
        for package in NEEDED[name]:
            if importlib.util.find_spec(package) is None:
                raise ConfigError(
                    f"the package {package} is not installed",
                    where=f"--track {name}",
                    hint=f"pip install 'tether-rlhf[{name}]'",
                )
