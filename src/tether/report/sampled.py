"""The completions of a rollout file on a page: a table that is sorted by a click, with each token's KL or advantage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from tether.errors import TetherError
from tether.monitor.trace import words
from tether.report.completions import Sample, Token, tokenizer_of, tokens_of
from tether.report.page import marked, paragraph, scrolling
from tether.report.style import SHADES
from tether.untrusted import lines_printable, one_line, printable, shortened

KL_SCALE = 3.0
"""Nats of the darkest shade. The scale of the advantage is its largest size among the completions."""
LONGEST_PROMPT, MOST_TOKENS = 400, 600
"""Characters of a prompt and tokens of a completion that are shown."""


def sample_section(run: Path, shown: Sequence[Sample], name: str, *, phrases: Sequence[str] = ()) -> str:
    """The completions of a run as a table; with the figures of their tokens, if its tokenizer can be loaded. ``name``
    is the table's, different on each page. A column says how many of the ``phrases`` of alarms a completion has."""
    if not any(one.row.get("sampler_logp") for one in shown):
        return sample_table(shown, [[] for _ in shown], name, phrases)
    try:
        tokenizer = tokenizer_of(run)
    except TetherError as error:
        why = f"The figures of the tokens are not shown, because the tokenizer cannot be loaded: {one_line(str(error))}"
        return paragraph(why) + sample_table(shown, [[] for _ in shown], name, phrases)
    return sample_table(shown, [tokens_of(one, tokenizer) for one in shown], name, phrases)


def sample_table(
    shown: Sequence[Sample], tokens: Sequence[Sequence[Token]], name: str, phrases: Sequence[str] = ()
) -> str:
    """One row per completion. Its text is that of its tokens, where there are some."""
    parts = sorted({part for one in shown for part in one.parts})
    has = {key: any(getattr(one, key) is not None for one in shown) for key in ("kl", "advantage")}
    head = ["reward", *(parts if len(parts) > 1 else []), *(key for key in has if has[key]), "tokens"]
    head += ["alarms"] * bool(phrases)
    buttons = "".join(f'<th><button type="button">{escape(printable(column))}</button></th>' for column in head)
    largest = max((abs(one.advantage or 0.0) for each in tokens for one in each), default=0.0)
    body = []
    for one, own in zip(shown, tokens, strict=True):
        values = [one.score, *(one.parts.get(part) for part in parts if len(parts) > 1)]
        values += [value for key, value in (("kl", one.kl), ("advantage", one.advantage)) if has[key]]
        cells = "".join(figure_cell(value) for value in values) + figure_cell(one.length, digits=0)
        if phrases:
            cells += figure_cell(sum(has_phrase(one.completion, phrase) for phrase in phrases), digits=0)
        text = shaded(own, largest) if own else marked(one.completion, phrases)
        prompt = escape(shortened(lines_printable(one.prompt), LONGEST_PROMPT))
        end = f' <small class="prompt">[{escape(one.finish_reason)}]</small>'
        body.append(f'<tr>{cells}<td class="said"><span class="prompt">{prompt}</span>{text}{end}</td></tr>')
    table = (
        f'<table id="{name}" data-shade="kl"><thead><tr>{buttons}<th class="said">prompt and completion</th></tr>'
        f"</thead><tbody>{''.join(body)}</tbody></table>"
    )
    return (shades(name, [key for key in has if has[key]]) if any(tokens) else "") + scrolling(table)


def has_phrase(text: str, phrase: str) -> bool:
    """Whether a text has the words of a phrase.

    >>> has_phrase("I Thank you, dear", "thank you"), has_phrase("loved", "love")
    (True, False)
    """
    return f" {phrase} " in f" {' '.join(words(text))} "


def figure_cell(value: float | None, *, digits: int = 2) -> str:
    if value is None:
        return '<td data-value="">-</td>'
    return f'<td data-value="{value:.6g}">{value:.{digits}f}</td>'


def shades(name: str, figures: Sequence[str]) -> str:
    """What the shading means can be chosen."""
    meant = {"kl": "log-prob over the reference's (token KL)", "advantage": "advantage"}
    options = "".join(f'<option value="{key}">{meant[key]}</option>' for key in figures)
    return (
        f'<p><label>Shading of tokens: <select data-shades="{name}">{options}<option value="">none</option></select>'
        "</label> Orange is above zero, blue below.</p>"
    )


def shaded(tokens: Sequence[Token], largest: float) -> str:
    """The text of a completion, whose tokens have a class per figure that is not near zero: ``k2`` is a KL of the
    second strength of four, ``a-4`` an advantage of the strongest below zero."""
    parts = []
    for token in tokens[:MOST_TOKENS]:
        text = escape(lines_printable(token.text))
        if not token.emitted:
            parts.append(f'<span class="prompt">{text}</span>')
            continue
        levels = [level(token.kl, KL_SCALE, "k"), level(token.advantage, largest, "a")]
        classes = " ".join(filter(None, levels))
        parts.append(f'<span class="{classes}">{text}</span>' if classes else text)
    left = len(tokens) - MOST_TOKENS
    return "".join(parts) + (f' <span class="prompt">({left} more tokens)</span>' if left > 0 else "")


def level(value: float | None, scale: float, name: str) -> str:
    """The class of a figure; "" near zero.

    >>> level(3.0, 3.0, "k"), level(-0.8, 1.0, "a"), level(0.01, 3.0, "k"), level(None, 1.0, "a")
    ('k4', 'a-3', '', '')
    """
    if value is None or not scale or not math.isfinite(value):
        return ""
    strength = min(SHADES, round(abs(value) / scale * SHADES))
    return f"{name}{'-' if value < 0 else ''}{strength}" if strength else ""
