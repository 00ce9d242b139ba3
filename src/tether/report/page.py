"""One self-contained HTML page: it loads nothing, and no script runs but its own (:mod:`tether.report.style`)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

from tether.observers import Alarm
from tether.report.plots import COLOURS, Panel, svg
from tether.report.style import CSS, POLICY, SCRIPT
from tether.runtime.files import atomic_write
from tether.untrusted import lines_printable, printable


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text: bool = False, left: int = 1) -> str:
    """A table of figures, the first column or two of them (``left``) being text, or of ``text`` alone; every cell is
    escaped."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    kind = ' class="text"' if text else ' class="two"' if left == 2 else ""
    return scrolling(f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def scrolling(element: str) -> str:
    """What is wider than a phone is scrolled by itself."""
    return f'<div class="scroll">{element}</div>'


def samples(rows: Sequence[tuple[str, str, str]]) -> str:
    """Completions behind their prompts: (label, prompt, completion)."""
    body = "".join(
        f'<tr><td>{escape(label)}</td><td><span class="prompt">{escape(prompt)}</span>{escape(completion)}</td></tr>'
        for label, prompt, completion in rows
    )
    return scrolling(f'<table class="text"><tbody>{body}</tbody></table>')


def side_by_side(prompt: str, answers: Sequence[tuple[str, str]]) -> str:
    """What several models answer to a prompt: (label, completion); below each other where the page is narrow."""
    cells = "".join(f"<div><b>{escape(label)}</b><br>{escape(lines_printable(said))}</div>" for label, said in answers)
    return f'<div class="pair"><div class="prompt">{escape(lines_printable(prompt))}</div>{cells}</div>'


def plots(panels: Sequence[Panel], caption: str, *, one_legend: bool = False) -> str:
    """Panels side by side, as many as fit. Those with several curves have a legend each; ``one_legend`` puts one above
    all of them instead, where a label has the same colour everywhere."""
    drawn = "".join(svg(panel, legend=not one_legend) for panel in panels)
    shared = legend(panels) if one_legend else ""
    return f'<figure>{shared}<div class="plots">{drawn}</div><figcaption>{escape(caption)}</figcaption></figure>'


def legend(panels: Sequence[Panel]) -> str:
    """The curves of all panels, each once."""
    curves = {one.label: one for panel in panels for one in panel.series}
    entries = [
        f'<span><i style="border-color: {colour_on_page(one.colour)}; '
        f'border-top-style: {"dotted" if one.points else "dashed" if one.dashed else "solid"}"></i>'
        f"{escape(printable(label))}</span>"
        for label, one in curves.items()
    ]
    return f'<p class="legend">{"".join(entries)}</p>'


def colour_on_page(colour: str) -> str:
    """A colour of the palette as the page's theme has it."""
    return f"var(--c{COLOURS.index(colour)})"


def folded(title: str, body: str) -> str:
    """What is shown when its title is clicked."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def section(title: str, *parts: str) -> str:
    return f"<h2>{escape(title)}</h2>" + "".join(parts)


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def bullets(lines: Sequence[str]) -> str:
    """A list of sentences; nothing for none."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def alarms(found: Sequence[tuple[int, Alarm]]) -> str:
    """What monitors have found, with examples in which the phrase is marked."""
    items = []
    for step, one in found:
        said = "".join(f"<p>{escape(printable(text))}</p>" for text in (one.message, one.advice) if text)
        quoted = "".join(f"<blockquote>{marked(text, [one.phrase])}</blockquote>" for text in one.examples)
        items.append(f"<li><b>{escape(printable(f'step {step}, {one.monitor}'))}</b>{said}{quoted}</li>")
    return f'<ul class="alarms">{"".join(items)}</ul>'


def marked(text: str, phrases: Sequence[str]) -> str:
    """A text in which some phrases, words between spaces, stand out wherever and however they are written.

    >>> marked("Thank  you, <b>", ["thank you"])
    '<mark>Thank  you</mark>, &lt;b&gt;'
    """
    patterns = [r"\s*".join(map(re.escape, phrase.split())) for phrase in phrases if phrase.split()]
    if not patterns:
        return escape(lines_printable(text))
    parts = re.split(f"({'|'.join(patterns)})", text, flags=re.IGNORECASE)
    return "".join(
        f"<mark>{escape(lines_printable(part))}</mark>" if i % 2 else escape(lines_printable(part))
        for i, part in enumerate(parts)
    )


def whole_page(title: str, lead: str, *sections: str) -> bytes:
    """The page as UTF-8."""
    html = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head>'
        f'<body><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>{"".join(sections)}'
        f"<script>{SCRIPT}</script></body></html>\n"
    )
    return html.encode(errors="backslashreplace")  # JSON may hold an unpaired surrogate, which UTF-8 cannot encode


def write_page(path: Path, page: bytes) -> None:
    """Write a page into a run directory, all of it or nothing; a link there is replaced, not followed."""
    with atomic_write(path) as partial:
        partial.write_bytes(page)
