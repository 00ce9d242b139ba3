"""Nothing outside the run directory is written or removed, whatever links and names say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from commandline import contents, tether, write_rows
from hostile import GRPO, TASK, complaint
from tether.runtime.files import atomic_write, remove


def linked(here: Path, name: str) -> Path:
    """Make a link called ``name`` to a directory with a file in it; gives the file."""
    target = here / "elsewhere"
    target.mkdir()
    work = target / "thesis.tex"
    work.write_text("a year")
    (here / name).symlink_to(target)
    return work


def replace(path: Path) -> None:
    """Put a directory in the place of ``path``."""
    with atomic_write(path) as partial:
        partial.mkdir()


def test_overwriting_a_run_leaves_what_its_links_point_to(here, tiny):
    assert tether(f"{TASK} --out out --quiet --keep-checkpoints --model", tiny) == 0
    for name in ("model", "checkpoints"):
        shutil.rmtree(here / "out" / name)
    work = linked(here, "out/model")
    (here / "out" / "checkpoints").symlink_to(work.parent)
    assert tether(f"{TASK} --out out --quiet --overwrite --model", tiny) == 0
    assert contents(work.parent) == {"thesis.tex": b"a year"}
    assert not (here / "out" / "model").is_symlink()


@pytest.mark.parametrize("take", [remove, replace])
def test_a_link_is_removed_and_its_target_stays(take, here):
    work = linked(here, "model")
    take(here / "model")
    assert not (here / "model").is_symlink()
    assert work.read_text() == "a year"


def test_a_link_as_the_run_directory_is_followed(here, tiny, capfd):
    """The user named it. What is not a run is refused behind a link too."""
    work = linked(here, "out")
    assert "not a run" in complaint(f"{TASK} --out out --overwrite --model", capfd, tiny)
    assert work.read_text() == "a year"
    work.unlink()
    assert tether(f"{TASK} --out out --quiet --model", tiny) == 0
    assert (work.parent / "config.yaml").is_file()
    assert (here / "out").is_symlink()


def test_a_path_that_looks_like_an_address_is_a_path(here, tiny):
    write_rows(here / "p.jsonl", [{"prompt": "a"}])
    assert tether(f"{TASK} --out mock:/out --quiet --model", tiny) == 0
    assert tether("report mock:/out") == 0
    assert (
        tether(f"{GRPO} --prompts mock:/out/rollouts/step_000001.parquet --reward r.py:fn --out two --model", tiny) == 0
    )
