"""The pairs that a reward model is judged by, one row each, in a run directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tether.runtime.files import write_table

TEST_PAIRS = "test_pairs.parquet"
"""The name of the file."""


@dataclass(frozen=True, kw_only=True)
class JudgedPair:
    """A pair with the scores of its sides."""

    prompt_index: int
    """Pairs of one prompt have the same."""
    prompt: str
    chosen: str
    rejected: str
    chosen_score: float
    """Raw, not normalised."""
    rejected_score: float
    margin: float
    """``chosen_score`` - ``rejected_score``."""
    chosen_length: int
    """Tokens."""
    rejected_length: int


def write_judged(directory: Path, pairs: Sequence[JudgedPair]) -> None:
    """Write :data:`TEST_PAIRS`, or replace it as a whole."""
    import pyarrow

    write_table(directory / TEST_PAIRS, pyarrow.Table.from_pylist([dataclasses.asdict(pair) for pair in pairs]))


def read_judged(directory: Path) -> list[JudgedPair]:
    """The rows of :data:`TEST_PAIRS`; empty where the run has no such file."""
    if not (directory / TEST_PAIRS).is_file():
        return []
    import pyarrow.parquet

    names = [field.name for field in dataclasses.fields(JudgedPair)]
    with (directory / TEST_PAIRS).open("rb") as file:
        rows = pyarrow.parquet.read_table(file, columns=names).to_pylist()
    return [
        JudgedPair(
            prompt_index=int(row["prompt_index"]),
            prompt=str(row["prompt"]),
            chosen=str(row["chosen"]),
            rejected=str(row["rejected"]),
            chosen_score=float(row["chosen_score"]),
            rejected_score=float(row["rejected_score"]),
            margin=float(row["margin"]),
            chosen_length=int(row["chosen_length"]),
            rejected_length=int(row["rejected_length"]),
        )
        for row in rows
    ]
