"""One self-contained HTML page: no script, no font, no image from anywhere else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from tether.runtime.files import atomic_write

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.lead { color: #555; margin-top: 0; } figure { margin: 1rem 0; } figcaption { color: #555; font-size: .9rem; }
svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .7rem; text-align: right; }
th { border-bottom: 2px solid #444; font-weight: 600; } td { border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
table.two :is(th, td):nth-child(2) { text-align: left; }
table.text td { text-align: left; vertical-align: top; } table.text th { text-align: left; }
table.text td:first-child { white-space: nowrap; color: #555; }
code, pre { font: 13px/1.4 ui-monospace, monospace; background: #f5f5f5; } pre { padding: .7rem; overflow-x: auto; }
.prompt { color: #777; }
"""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text: bool = False, left: int = 1) -> str:
    """A table of figures, the first column or two of them (``left``) being text, or of ``text`` alone; every cell is
    escaped."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    kind = ' class="text"' if text else ' class="two"' if left == 2 else ""
    return f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def samples(rows: Sequence[tuple[str, str, str]]) -> str:
    """Completions behind their prompts: (label, prompt, completion)."""
    body = "".join(
        f'<tr><td>{escape(label)}</td><td><span class="prompt">{escape(prompt)}</span>{escape(completion)}</td></tr>'
        for label, prompt, completion in rows
    )
    return f'<table class="text"><tbody>{body}</tbody></table>'


def plot(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def section(title: str, *parts: str) -> str:
    return f"<h2>{escape(title)}</h2>" + "".join(parts)


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def bullets(lines: Sequence[str]) -> str:
    """A list of sentences; nothing for none."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def whole_page(title: str, lead: str, *sections: str) -> bytes:
    """The page as UTF-8."""
    html = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f'<body><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>{"".join(sections)}</body></html>\n'
    )
    return html.encode(errors="backslashreplace")  # JSON may hold an unpaired surrogate, which UTF-8 cannot encode


def write_page(path: Path, page: bytes) -> None:
    """Write a page into a run directory, all of it or nothing; a link there is replaced, not followed."""
    with atomic_write(path) as partial:
        partial.write_bytes(page)
