"""No name and no text becomes markup of a report, a file name or a control sequence."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from commandline import contents, tether, write_rows
from hostile import GRPO
from tether.report.page import legend, samples, whole_page
from tether.report.plots import COLOURS, Panel, Series, svg
from tether.report.style import SCRIPT
from tether.untrusted import printable

HOSTILE = "../../x<script>alert(1)</script>--><b onload='x'>&\x1b]0;owned\x07\x1b[31m\x9b2J\u202e$x_{$\\frac"


@dataclass
class Tags:
    """The markup of a page, apart from its text."""

    page: str

    def __post_init__(self) -> None:
        from html.parser import HTMLParser

        self.names: set[str] = set()
        self.attributes: set[str] = set()
        parser = HTMLParser()
        parser.handle_starttag = self.take  # type: ignore[method-assign]
        parser.handle_startendtag = self.take  # type: ignore[method-assign]
        parser.feed(self.page)

    def take(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attributes}


def test_hostile_names_and_texts_stay_text_and_in_the_run_directory(here, tiny, capfd):
    """Names of rewards, columns and prompts that are paths, markup, formulas or control sequences."""
    here = here / "inside"  # so that ../.. is in the test's own directory too
    here.mkdir()
    os.chdir(here)
    (here / "r.py").write_text(
        f"def fn(completions, **columns):\n    return [1.0] * len(completions)\nglobals()[{HOSTILE!r}] = fn\n"
        "globals()['$y_{$'] = fn\n"
    )
    write_rows(here / "p.jsonl", [{"prompt": f"{i} {HOSTILE}", HOSTILE: HOSTILE, "../x": "/etc/x"} for i in range(3)])
    rewards = ("--reward", f"r.py:{HOSTILE}", "r.py:$y_{$")
    write_rows(here / "e.jsonl", [{"prompt": f"held out {HOSTILE}"}])
    line = f"{GRPO} --prompts p.jsonl --eval-prompts e.jsonl --out out --model"
    before = contents(here.parent)
    capfd.readouterr()
    assert tether(line, tiny, *rewards) == 0
    assert tether("report out") == 0
    printed = capfd.readouterr()
    assert printable(line_free(printed.out + printed.err)) == line_free(printed.out + printed.err)
    new = contents(here.parent).keys() - before.keys()
    assert {Path(name).parts[:2] for name in new if "__pycache__" not in name} == {("inside", "out")}
    page = (here / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("&lt;script&gt;alert(1)") >= 4
    harmless(page)


def line_free(text: str) -> str:
    return text.replace("\n", "")


def harmless(page: str) -> None:
    """A page without a script but its own, or anything that would load or run one."""
    assert page.count(f"<script>{SCRIPT}</script>") == 1
    tags = Tags(page.replace(f"<script>{SCRIPT}</script>", ""))
    assert not tags.names & {"script", "img", "iframe", "object", "embed", "link", "base", "form", "foreignobject"}
    assert not [name for name in tags.attributes if name.startswith("on") or name in ("src", "action", "formaction")]


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "</td></table><img src=x onerror=alert(1)>",
        "'\"><svg onload=alert(1)>",
        "<!-- --><style>*{}</style>",
        "&lt;script&gt;&#60;script>",
        "\x00\x1b[2J\ud800\u202e",
    ],
)
def test_no_text_becomes_markup_of_a_report(text):
    panel = Panel(
        title=text, x_label=text, y_label=text, series=[Series(label=text, x=[1], y=[2], colour=COLOURS[0])] * 2
    )
    drawing = svg(panel) if text.isprintable() else ""  # titles and axes are tether's own; labels are data
    drawing += svg(Panel(title="t", x_label="x", y_label="y", series=panel.series))
    page = whole_page(text, text, samples([(text, text, text)]), legend([panel]), drawing).decode()
    harmless(page)
    assert "\ud800" not in page
