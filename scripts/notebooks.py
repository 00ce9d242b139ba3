"""The notebooks: run them, or empty them of outputs before they are committed.

    python -m scripts.notebooks                      # remove the outputs of notebooks/*.ipynb
    python -m scripts.notebooks --run OUT [--small]  # run copies in OUT, with their outputs

``--small`` runs them at the sizes of the tests.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
SMALL = "TETHER_SMALL"
"""The environment variable that makes a notebook small."""
LONGEST = 1200
"""Seconds that a cell may take, on a machine that is busy."""


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def write(notebook: NotebookNode, path: Path) -> None:
    """As Jupyter does it: the cells first, one line of source per line."""
    nbformat.validate(notebook)
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def emptied(notebook: NotebookNode) -> NotebookNode:
    """The notebook without what running it has left."""
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.metadata = NotebookNode(
        kernelspec=NotebookNode(display_name="Python 3 (ipykernel)", language="python", name="python3"),
        language_info=NotebookNode(name="python"),
    )
    return notebook


def executed(notebook: NotebookNode, *, small: bool, directory: Path) -> NotebookNode:
    """The notebook with its outputs, run in ``directory`` by a kernel of this Python.

    Raises :class:`nbclient.exceptions.CellExecutionError` at the first cell that fails.
    """
    client = NotebookClient(
        notebook, timeout=LONGEST, kernel_name="python3", resources={"metadata": {"path": str(directory)}}
    )
    own = {name: value for name, value in os.environ.items() if name != SMALL}
    return client.execute(env={**own, SMALL: "1"} if small else own)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, default=NOTEBOOKS, help="by default all of them")
    parser.add_argument("--run", type=Path, metavar="OUT", help="run copies of them into this directory")
    parser.add_argument("--small", action="store_true", help="at the sizes of the tests")
    options = parser.parse_args()
    for path in options.notebooks:
        if options.run is None:
            write(emptied(read(path)), path)
            continue
        options.run.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            found = executed(read(path), small=options.small, directory=Path(directory))
        write(found, options.run / path.name)
        print(f"{path.name}: {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
