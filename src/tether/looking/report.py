"""``tether report``: draw one run, or several beside each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tether.flags import POSITIONAL
from tether.looking.terminal import show
from tether.report.run import write_report
from tether.runtime.files import is_stream


@dataclass(frozen=True, kw_only=True)
class Report:
    """Draw one run, or several beside each other, as one HTML page."""

    runs: tuple[str, ...] = field(metadata={POSITIONAL: "RUN"})
    """Run directories."""
    out: str | None = None
    """File to write; report.html of the run unless given, which several runs require."""


def report(command: Report) -> None:
    out = write_report([Path(run) for run in command.runs], Path(command.out) if command.out else None)
    if not is_stream(out):
        show(str(out))
