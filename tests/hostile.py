"""What the tests of security share: command lines, and checks of what a command said and left."""

from __future__ import annotations

from pathlib import Path

from commandline import tether

MARKER = "marker"
RUNS = "from pathlib import Path\nPath('marker').write_text('ran')\nclass A: pass\n"
GRPO = "grpo --max-new-tokens 2 --steps 1 --prompts-per-step 2 --group-size 2"
TASK = f"{GRPO} --prompts p.jsonl --reward r.py:fn"


def complaint(line: str, capfd, *more: object) -> str:
    """The one line of a refused command; also checks that the marker was not made."""
    capfd.readouterr()
    assert tether(line, *more) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert not Path(MARKER).exists()
    return said


def run_directory(file: str, content: str | bytes) -> Path:
    """A run with this one file."""
    run = Path("run")
    run.mkdir()
    (run / "config.yaml").write_text("command: grpo\nmodel: m\n")
    (run / file).parent.mkdir(exist_ok=True)
    (run / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    return run
