"""Every notebook runs from the first cell to the last, at a small size, and is stored without outputs."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

from nbclient.exceptions import CellExecutionError
from scripts import notebooks

IDS = [path.stem for path in notebooks.NOTEBOOKS]


def test_there_are_four():
    assert IDS == ["1_reward_model", "2_rejection_sampling", "3_ppo", "4_grpo"]


@pytest.mark.slow
@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=IDS)
def test_it_runs_and_shows_figures(path, tmp_path):
    found = notebooks.executed(notebooks.read(path), small=True, directory=tmp_path)
    outputs = [output for cell in found.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output.data for output in outputs if output.output_type in ("display_data", "execute_result")]
    assert sum("image/png" in data for data in shown) >= 2
    assert any("<table>" in data.get("text/html", "") for data in shown)
    written = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "Warning" not in written
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=IDS)
def test_it_is_stored_without_outputs_as_jupyter_writes_it(path, tmp_path):
    notebooks.write(notebooks.emptied(notebooks.read(path)), tmp_path / path.name)
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=IDS)
def test_it_has_equations_and_ends_in_something_to_try(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    prose = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    assert sum(text.count("$$") for text in prose) >= 4  # an equation stands between two
    assert "## Try\n" in prose[-1]
    assert cells[-1]["cell_type"] == "markdown"


@pytest.mark.slow
def test_a_cell_that_fails_is_an_error(tmp_path):
    path = notebooks.NOTEBOOKS[0]
    broken = notebooks.emptied(notebooks.read(path))
    broken.cells = [cell for cell in broken.cells if cell.cell_type == "code"][:1]
    broken.cells[0].source = "assert 1 > 2"
    with pytest.raises(CellExecutionError, match="AssertionError"):
        notebooks.executed(broken, small=True, directory=tmp_path)
