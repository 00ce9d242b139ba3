"""``tether compare``: which of several runs is better, by how much, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from tether.errors import ConfigError
from tether.flags import POSITIONAL
from tether.looking.options import options_of
from tether.looking.terminal import grid, rendered, show
from tether.report.comparison import Comparison, compare, differing_options, distinct_figures
from tether.report.held_out import Candidate, read_candidates
from tether.report.several import comparison_page
from tether.report.verdict import PAIRS, STANDINGS, called, headline, notes, pair_cells, standing_cells, verdicts
from tether.runtime.files import is_stream, require_file, write_output
from tether.runtime.json_text import to_json
from tether.untrusted import printable


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Say which of several runs is better, by how much, and how sure that is. A quickstart's directory stands for the
    base model and the methods in it."""

    runs: tuple[str, ...] = field(metadata={POSITIONAL: "RUN"})
    """Run directories."""
    by: str | None = None
    """Reward to compare by: score, or the name of one. Unless given, one that no run was trained on, else the score."""
    json: bool = False
    """Print one JSON object, with all figures."""
    out: str | None = None
    """File to write the comparison to as an HTML page, with plots and samples; the terminal unless given."""

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        ConfigError.unless(self, {"give one of --json and --out": not (self.json and self.out)})


def main(command: Compare) -> None:
    if command.out is not None:
        require_file(Path(command.out))
    candidates = read_candidates([Path(run) for run in command.runs])
    if all(one.view is not None and one.view.command == "reward" for one in candidates):
        raise ConfigError(
            "these are reward-model runs, which have no policies to compare",
            where=", ".join(command.runs),
            hint="compare them on the same pairs: tether eval --reward-model RUN/model --pairs FILE for each",
        )
    found = compare(candidates, by=command.by)
    if command.out is not None:
        out = Path(command.out)
        write_output(out, comparison_page(candidates, found))
        if not is_stream(out):
            show(command.out)
    elif command.json:
        show(to_json(as_data(candidates, found), indent=2, ascii_only=True))
    else:
        show(rendered(*in_full(candidates, found)))


def as_data(candidates: Sequence[Candidate], found: Comparison) -> dict[str, Any]:
    """The comparison as JSON; what is not finite becomes null."""
    views = [one.view for one in candidates if one.view is not None]
    options = {
        name: dict(zip([view.name for view in views], row, strict=True)) for name, *row in differing_options(views)
    }
    return {
        **asdict(found),
        "interval_level_of_pairs": found.level,
        "options": options,
        "verdict": verdicts(found),
        "notes": notes(found),
    }


def in_full(candidates: Sequence[Candidate], found: Comparison) -> list[RenderableType]:
    """The verdict, the tables, the options that differ, and what has to be known to read them."""
    name = called(found.figure)
    parts: list[RenderableType] = [Text(printable(headline(found, distinct_figures(candidates))))]
    parts.append(grid(["run", name, *STANDINGS[1:]], [standing_cells(one) for one in found.standings]))
    if found.pairs:
        parts.append(grid(PAIRS, [pair_cells(one) for one in found.pairs], left=2))
    parts += [Text(printable(line)) for line in verdicts(found)]
    parts += options_of([one.view for one in candidates if one.view is not None])
    parts += [Text(), *(Text(printable(line), style="dim") for line in notes(found))]
    return parts
