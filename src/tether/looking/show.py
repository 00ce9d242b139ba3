"""``tether show``: the completions of a run, read in a terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import RenderableType
from rich.text import Text

from tether.errors import ConfigError, RunError
from tether.flags import POSITIONAL
from tether.looking.terminal import grid, rendered, show
from tether.report.completions import (
    Sample,
    Token,
    different_prompts_first,
    held_out_file,
    read_completions,
    references_of,
    rollout_file,
    tokenizer_of,
    tokens_of,
)
from tether.untrusted import lines_printable, printable

Key = Literal["reward", "kl", "length"]
Shade = Literal["logp", "kl", "advantage"]
SCALE = {"logp": 6.0, "kl": 3.0}
"""Nats of the darkest shade. The scale of the advantage is its largest size among the completions."""


@dataclass(frozen=True, kw_only=True)
class Show:
    """Read the completions of a run, with their rewards, length and finish reason."""

    run: str = field(metadata={POSITIONAL: "RUN"})
    """Run directory."""
    step: int | None = None
    """Step whose rollouts to show; the newest unless given."""
    held_out: bool = False
    """Show the held-out completions of the trained policy and of its reference, not rollouts."""
    sort: Key | None = None
    """Show those with the highest first; the order of the file unless given."""
    lowest: bool = False
    """With --sort, show those with the lowest first."""
    number: int = 8
    """Completions to show. Of held-out ones, those of different prompts come first, each above the reference's of the
    same prompt and seed."""
    tokens: bool = False
    """Show the figures of each token: on a terminal as shading, elsewhere one line per token."""
    shade: Shade = "logp"
    """With --tokens, what the shading means: log-prob, KL to the reference, or advantage."""

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        ConfigError.unless(
            self,
            {
                "number must be at least 1": self.number >= 1,
                "give one of --step and --held-out": self.step is None or not self.held_out,
                "held-out completions are kept without their tokens: leave out --tokens or --held-out": not (
                    self.tokens and self.held_out
                ),
                "--lowest needs --sort": self.sort is not None or not self.lowest,
            },
        )


def main(command: Show) -> None:
    run = Path(command.run)
    file = held_out_file(run) if command.held_out else rollout_file(run, command.step)
    found = read_completions(file)
    references = references_of(found) if command.held_out else {}
    own = [one for one in found if one.model != "reference"] if command.held_out else found
    ordered = different_prompts_first(own) if command.held_out and command.sort is None else own
    chosen = in_order(ordered, command.sort, lowest=command.lowest)[: command.number]
    parts: list[RenderableType] = []
    tokenizer = tokenizer_of(run) if command.tokens else None
    lists = [tokens_of(one, tokenizer) if tokenizer is not None else [] for one in chosen]
    largest = scale_of(lists, command.shade, where=file) if command.tokens else 1.0
    if command.tokens and sys.stdout.isatty():
        parts.append(legend(command.shade, largest))
    for one, tokens in zip(chosen, lists, strict=True):
        parts += [Text(), *in_full(one, tokens, command.shade, largest)]
        if (reference := references.get(id(one))) is not None:
            parts += in_full(reference, [], command.shade, largest)
    head = printable(f"{file}: {len(chosen)} of {len(own)} completions")  # a path that is broken cannot be copied
    show(f"{head}\n{rendered(*parts)}")


def in_order(found: Sequence[Sample], key: Key | None, *, lowest: bool) -> list[Sample]:
    """The completions by a figure, those without it last. Raises :class:`ConfigError` where none has it."""
    if key is None:
        return list(found)
    figures: dict[Key, Callable[[Sample], float | None]] = {
        "reward": lambda one: one.score,
        "kl": lambda one: one.kl,
        "length": lambda one: one.length,
    }
    known = [(value, one) for one in found if (value := figures[key](one)) is not None]
    if found and not known:
        raise ConfigError(f"these completions have no {key}", where=f"--sort {key}")
    ordered = [one for _, one in sorted(known, key=lambda pair: pair[0] if lowest else -pair[0])]
    return [*ordered, *(one for one in found if figures[key](one) is None)]


def in_full(one: Sample, tokens: Sequence[Token], shade: Shade, largest: float) -> list[RenderableType]:
    """One completion: its figures, its prompt, and its text or its tokens."""
    figures = Text(printable(figures_line(one)), style="bold")
    prompt = Text(lines_printable(one.prompt), style="dim")
    terminal = sys.stdout.isatty()
    if not tokens and terminal:
        return [figures, Text.assemble(prompt, lines_printable(one.completion))]
    if not terminal:  # where no style tells them apart
        prompt = Text(f"prompt: {lines_printable(one.prompt)}")
    if not tokens:
        return [figures, prompt, Text(f"completion: {lines_printable(one.completion)}")]
    if not terminal:
        return [figures, prompt, grid(["token", "logp", "kl", "advantage"], [token_cells(token) for token in tokens])]
    shaded = [
        Text(lines_printable(token.text), style=style(figure_of(token, shade), shade, largest)) for token in tokens
    ]
    return [figures, Text.assemble(prompt, *shaded)]


def figures_line(one: Sample) -> str:
    """``reward 0.81 (helpful 0.9, length -0.1)  kl 12.1  advantage +0.4  28 tokens, eos``"""
    parts = ", ".join(f"{name} {figure(value)}" for name, value in one.parts.items())
    advantage = "" if one.advantage is None else f"advantage {one.advantage:+.3g}"
    said = [
        one.model,
        f"reward {figure(one.score)}{f' ({parts})' if parts else ''}",
        "" if one.kl is None else f"kl {one.kl:.3g}",
        advantage,
        f"{one.length} tokens, {one.finish_reason}",
    ]
    return "  ".join(filter(None, said))


def figure(value: float | None) -> str:
    """Three digits, or a dash where no reward applies."""
    return "–" if value is None else f"{value:.3g}"


def figure_of(token: Token, shade: Shade) -> float | None:
    """What the shade of a token stands for."""
    return {"logp": token.logp, "kl": token.kl, "advantage": token.advantage}[shade]


def scale_of(lists: Sequence[Sequence[Token]], shade: Shade, *, where: Path) -> float:
    """What the darkest shade stands for. Raises :class:`RunError` where the file has no such figure."""
    sizes = [abs(value) for tokens in lists for token in tokens if (value := figure_of(token, shade)) is not None]
    if not sizes:
        raise RunError(f"holds no {shade} of its tokens", where=where, hint="choose another --shade")
    return SCALE.get(shade, max(sizes) or 1.0)


def token_cells(token: Token) -> list[str]:
    """The row of a token, where there are no shades."""
    text = printable(token.text).replace(" ", "·") if token.emitted else f"({printable(token.text)})"
    return [text, *("–" if one is None else f"{one:+.3f}" for one in (token.logp, token.kl, token.advantage))]


def style(value: float | None, shade: Shade, largest: float) -> str:
    """The shade of a token: of log-probs red, the less likely the darker; else blue for positive values and red for
    negative ones. Tokens that the policy did not emit are dim."""
    if value is None:
        return "dim"
    depth = min(1.0, abs(value) / largest)
    if not math.isfinite(depth) or depth < 0.05:
        return ""
    pale = round(255 - 135 * depth)
    positive = shade != "logp" and value > 0
    return f"black on rgb({pale},{pale},255)" if positive else f"black on rgb(255,{pale},{pale})"


def legend(shade: Shade, largest: float) -> Text:
    """What the shades mean."""
    ends = (-largest, -largest / 2) if shade == "logp" else (-largest, -largest / 2, largest / 2, largest)
    named = {"logp": "log-prob", "kl": "KL to the reference (logp - ref_logp)", "advantage": "advantage"}[shade]
    marks: list[Any] = [(f" {end:+.2g} ", style(end, shade, largest)) for end in ends]
    return Text.assemble(f"{named}: ", *marks)
