"""``tether presets``: the recipes whose options a training command can begin with."""

from __future__ import annotations

from dataclasses import dataclass, field

import yaml

from tether.errors import ConfigError
from tether.flags import POSITIONAL
from tether.looking.terminal import grid, rendered, show
from tether.names import closest, did_you_mean
from tether.presets import PRESETS


@dataclass(frozen=True, kw_only=True)
class Presets:
    """List the recipes whose options a training command can begin with (--preset NAME), or show one as a file for
    --config."""

    name: str | None = field(default=None, metadata={POSITIONAL: "NAME"})
    """Preset to show; all are listed unless given."""

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)


def main(command: Presets) -> None:
    if command.name is None:
        rows = [[name, preset.command, preset.summary] for name, preset in PRESETS.items()]
        show(rendered(grid(["preset", "command", "what"], rows, left=3)))
        return
    preset = PRESETS.get(command.name)
    if preset is None:
        raise ConfigError(
            f"there is no preset {command.name!r}",
            hint=f"{did_you_mean(closest(command.name, list(PRESETS)))} 'tether presets' lists them".strip(),
        )
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in preset.options.items()}
    head = f"# {preset.summary}\n# from {preset.source}\n# tether {preset.command} --preset {command.name}\n"
    show(head + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).rstrip("\n"))
