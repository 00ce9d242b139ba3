"""Draw the structure of tether from its code: the tree by layers, and the path of one step.

    python -m scripts.architecture            # writes docs/architecture.svg
    python -m scripts.architecture --check    # exit code 1 if that is not what the code gives now

The layers are the longest chains of imports between the packages and modules directly below ``tether``. The path is
recorded: one step of PPO is run on the embedded model, and the functions of :data:`STATIONS` have to be called in
this order.
"""

from __future__ import annotations

import argparse
import ast
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
SRC, FIGURE = ROOT / "src" / "tether", ROOT / "docs" / "architecture.svg"

STATIONS = (
    ("training.ppo.train", "tether ppo: load and check everything"),
    ("training.policy.run_policy", "the loop: prompts from the cursor"),
    ("algorithms.ppo.step", "the algorithm on one screen"),
    ("generation.engine.Engine.generate", "requests -> rollout groups"),
    ("rewards.combine.WeightedSum.score", "-> scored groups"),
    ("algorithms.ppo.collect", "-> experience: a batch and its figures"),
    ("algorithms.rollouts.sampled_of", "old_logp, and ref_logp by the reference"),
    ("models.packing.pack", "each prompt once for all its completions"),
    ("algorithms.rollouts.kl_figures", "the KL to the reference"),
    ("algorithms.ppo.token_rewards", "score - kl_coef * KL, token by token"),
    ("ops.returns.gae", "advantages and returns"),
    ("algorithms.policy_update.learn", "epochs of minibatches"),
    ("ops.losses.ppo_loss", "loss inputs -> loss terms"),
    ("ops.reduce.reduce_loss", "one denominator for the whole step"),
    ("algorithms.optimise.apply", "one optimizer step, or a skipped one"),
    ("generation.engine.Engine.load_weights", "the trainable part, to the generator"),
    ("runtime.recorder.Recorder.record", "the end of a step"),
    ("runtime.directory.RunDirectory.log", "the row of metrics, beside alarms and rollouts"),
    ("runtime.checkpoint.Checkpoints.save", "the state, when due"),
)
"""Functions on the path of a step, in the order of their calls, and what each does."""


@dataclass(frozen=True)
class Part:
    """A package or a module directly below ``tether``."""

    name: str
    files: tuple[str, ...]
    imports: frozenset[str]


def part_of(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """The parts that a file imports from, at its top or in functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "tether" else [f"tether.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("tether."))


def parts() -> dict[str, Part]:
    """The parts of the package, by name."""
    files: dict[str, list[Path]] = {}
    for path in sorted(SRC.rglob("*.py")):
        if path != SRC / "__init__.py":
            files.setdefault(part_of(path), []).append(path)
    return {
        name: Part(
            name,
            tuple(path.stem for path in paths if path.parent != SRC and path.stem != "__init__"),
            frozenset(part for path in paths for part in imported(path) if part in files and part != name),
        )
        for name, paths in files.items()
    }


def layers(found: dict[str, Part]) -> list[list[Part]]:
    """Parts by the length of their longest chain of imports, the ground first. Raises where imports form a circle."""
    depth: dict[str, int] = {}

    def measure(name: str, above: tuple[str, ...]) -> int:
        if name in above:
            raise ValueError(f"imports form a circle: {' -> '.join([*above, name])}")
        if name not in depth:
            depth[name] = 1 + max((measure(one, (*above, name)) for one in found[name].imports), default=-1)
        return depth[name]

    for name in found:
        measure(name, ())
    return [[found[name] for name in sorted(found) if depth[name] == d] for d in range(max(depth.values()) + 1)]


def calls_of_a_step() -> list[str]:
    """The calls of functions of tether in ``tether ppo`` with one step, in their order."""
    from tether.cli import main

    calls: list[str] = []
    prefix = f"{SRC}/"

    def profile(frame: FrameType, event: str, _: object) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(prefix):
            module = file.removeprefix(prefix).removesuffix(".py").replace("/", ".")
            calls.append(f"{module}.{frame.f_code.co_qualname}")

    with tempfile.TemporaryDirectory() as folder:
        line = f"ppo --model base --prompts {ROOT}/examples/prompts.jsonl --reward length:8 --max-new-tokens 4 --quiet"
        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            code = main([*line.split(), "--steps", "1", "--prompts-per-step", "2", "--out", f"{folder}/run"])
        finally:
            sys.setprofile(before)
    if code:
        raise RuntimeError(f"tether ppo ended with {code}")
    return calls


def check_path(calls: list[str]) -> None:
    """Raise unless the stations are among the calls, in their order."""
    left = iter(calls)
    for name, _ in STATIONS:
        if name not in left:  # continues from where the one before was found
            raise ValueError(f"the path of a step has no call of {name} here")


LINE, WIDTH, LEFT, GAP = 14, 1180, 640, 8
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.name{font-weight:600}.small{font-size:10.5px;fill:#555}"
    ".title{font-size:15px;font-weight:600}.box{fill:#f4f7fb;stroke:#8fa8c8}.station{fill:#fdf6ec;stroke:#d8a860}"
    ".arrow{stroke:#999;fill:none}"
)


def wrapped(words: tuple[str, ...], width: int) -> list[str]:
    """Words in lines of at most ``width`` characters."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) + 2 > width:
            lines.append("")
        lines[-1] += (", " if lines[-1] else "") + word
    return [line for line in lines if line]


def title(part: Part) -> str:
    return part.name + ("/" if part.files else ".py")


def narrowest(part: Part) -> float:
    """Width of the narrowest box that holds the longest word of a part."""
    return max([7.4 * len(title(part)), *(6.2 * len(file) for file in part.files)]) + 14


def rows_of(layer: list[Part]) -> Iterator[list[Part]]:
    """The boxes of a layer, in rows that hold their words."""
    row: list[Part] = []
    for part in layer:
        if row and sum(narrowest(one) + GAP for one in [*row, part]) > LEFT - 40 + GAP:
            yield row
            row = []
        row.append(part)
    yield row


def draw_layers(found: list[list[Part]]) -> tuple[list[str], float]:
    """The tree, the top layer first; gives elements and the height."""
    out, y = ['<text class="title" x="20" y="28">The tree: every import points down</text>'], 44.0
    for row in [row for layer in reversed(found) for row in rows_of(layer)]:
        left_over = LEFT - 40 - sum(narrowest(part) + GAP for part in row) + GAP
        shares = [4 if part.files else 1 for part in row]
        widths = [narrowest(part) + left_over * share / sum(shares) for part, share in zip(row, shares, strict=True)]
        texts = [wrapped(part.files, int(width / 6)) for part, width in zip(row, widths, strict=True)]
        height = 24 + LINE * max(map(len, texts))
        x = 20.0
        for part, width, lines in zip(row, widths, texts, strict=True):
            out.append(f'<rect class="box" x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height}" rx="4"/>')
            out.append(f'<text class="name" x="{x + 7:.0f}" y="{y + 16:.0f}">{escape(title(part))}</text>')
            for k, line in enumerate(lines):
                out.append(f'<text class="small" x="{x + 7:.0f}" y="{y + 31 + k * LINE:.0f}">{escape(line)}</text>')
            x += width + GAP
        y += height + GAP
    return out, y


def draw_path() -> tuple[list[str], float]:
    """The path of a step, from top to bottom; gives elements and the height."""
    x, y = LEFT + 20, 44.0
    out = [f'<text class="title" x="{x}" y="28">The path of a step, here of PPO</text>']
    for i, (name, what) in enumerate(STATIONS, 1):
        out.append(f'<rect class="station" x="{x}" y="{y:.0f}" width="{WIDTH - x - 20}" height="34" rx="4"/>')
        out.append(f'<text class="name" x="{x + 8}" y="{y + 14:.0f}">{i}. {escape(name)}</text>')
        out.append(f'<text class="small" x="{x + 8}" y="{y + 28:.0f}">{escape(what)}</text>')
        if i < len(STATIONS):
            out.append(f'<path class="arrow" d="M{x + 20} {y + 34:.0f}v6"/>')
        y += 40
    return out, y


def drawing() -> str:
    """The figure as SVG text, from the code as it is."""
    check_path(calls_of_a_step())
    left, left_height = draw_layers(layers(parts()))
    right, right_height = draw_path()
    height = max(left_height, right_height) + 10
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" role="img">'
    heading = "<title>The layers of tether and the path of a step</title>"
    background = '<rect width="100%" height="100%" fill="#fff"/>'
    return "\n".join([head, heading, f"<style>{STYLE}</style>", background, *left, *right, "</svg>"]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the file and write nothing")
    check = parser.parse_args().check
    text = drawing()
    if check:
        same = FIGURE.is_file() and FIGURE.read_text(encoding="utf-8") == text
        print(f"{FIGURE.relative_to(ROOT)} {'is up to date' if same else 'is not what the code gives now'}")
        return 0 if same else 1
    FIGURE.write_text(text, encoding="utf-8")
    print(f"wrote {FIGURE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
