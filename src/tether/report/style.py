"""How the pages look, and their one script."""

from __future__ import annotations

import base64
import hashlib

from tether.report.plots import COLOURS

DARK = ("#56a8e0", "#f08a4b", "#3fc8a0", "#e29cc3", "#f0b93a", "#8accf2", "#a9a9a9")
"""The palette on a dark page, colour by colour."""
SHADES = 4
"""Strengths in which a token is shaded, in either direction."""


def variables(colours: tuple[str, ...]) -> str:
    return " ".join(f"--c{i}: {colour};" for i, colour in enumerate(colours))


def shading() -> str:
    """Tokens above zero are orange, those below blue; the table says which figure counts."""
    rules = []
    for shade in ("kl", "advantage"):
        for level in range(1, SHADES + 1):
            share = round(0.15 * level, 2)
            for sign, colour in (("", "213 94 0"), ("-", "0 114 178")):
                where = f"table[data-shade={shade}] .{shade[0]}{sign}{level}"
                rules.append(f"{where} {{ background: rgb({colour} / {share}); }}")
    return "\n".join(rules)


CSS = f"""
:root {{ color-scheme: light dark; --ink: #222; --soft: #5c5c5c; --line: #ddd; --back: #fff; --panel: #f5f5f5;
  --alarm: #b3261e; {variables(COLOURS)} }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e4e4e4; --soft: #a5a5a5; --line: #3a3a3a; --back: #16181b;
  --panel: #22252a; --alarm: #ff8a80; {variables(DARK)} }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 66rem;
  margin: 2rem auto; padding: 0 1rem; }}
p, li, h1, td.said, table.text td, .pair {{ overflow-wrap: anywhere; }}
h1 {{ font-size: 1.6rem; margin-bottom: .2rem; }} h2 {{ font-size: 1.15rem; margin-top: 2.2rem; }}
p.lead {{ color: var(--soft); margin-top: 0; }} figure {{ margin: 1rem 0; }}
figcaption {{ color: var(--soft); font-size: .9rem; }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }}
.plots svg {{ width: 100%; height: auto; }}
.legend span {{ display: inline-block; margin-right: 1.2rem; white-space: nowrap; }}
.legend i {{ display: inline-block; width: 1.6rem; border-top: 3px solid; vertical-align: middle;
  margin-right: .4rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin: 1rem 0; }} th, td {{ padding: .3rem .7rem; text-align: right;
  white-space: nowrap; }}
th {{ border-bottom: 2px solid var(--soft); font-weight: 600; }} td {{ border-bottom: 1px solid var(--line); }}
th:first-child, td:first-child {{ text-align: left; }}
table.two :is(th, td):nth-child(2) {{ text-align: left; }}
table.text td {{ text-align: left; vertical-align: top; white-space: normal; }} table.text th {{ text-align: left; }}
table.text td:first-child {{ color: var(--soft); min-width: 5rem; }}
:is(th, td).said {{ text-align: left; min-width: 18rem; white-space: pre-wrap; }} tbody td {{ vertical-align: top; }}
th button {{ font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0;
  cursor: pointer; text-decoration: underline dotted; }}
th[aria-sort=descending] button::after {{ content: " \\2193"; }}
th[aria-sort=ascending] button::after {{ content: " \\2191"; }}
select {{ font: inherit; }} summary {{ cursor: pointer; }}
code, pre {{ font: 13px/1.4 ui-monospace, monospace; background: var(--panel); }}
pre {{ padding: .7rem; overflow-x: auto; }}
.pair {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: .3rem 1.5rem;
  border-bottom: 1px solid var(--line); padding: .6rem 0; }}
.pair > :first-child {{ grid-column: 1 / -1; }} .pair b {{ color: var(--soft); font-weight: 600; }}
.prompt {{ color: var(--soft); }} .alarms li {{ border-left: 4px solid var(--alarm); padding-left: .7rem;
  margin: .5rem 0; list-style: none; }} .alarms {{ padding: 0; }} .alarms b {{ color: var(--alarm); }}
.alarms p {{ margin: .2rem 0; }}
blockquote {{ margin: .3rem 0 .3rem 1rem; color: var(--soft); overflow-wrap: anywhere; }}
mark {{ background: none; color: var(--alarm); font-weight: 600; }}
{shading()}
"""

SCRIPT = """
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
    const down = head.ariaSort !== "descending";
    const value = (row) => parseFloat(row.cells[head.cellIndex].dataset.value);
    const order = (one, other) => {
      const a = value(one), b = value(other);
      if (isNaN(a) || isNaN(b)) return isNaN(a) - isNaN(b);
      return down ? b - a : a - b;
    };
    for (const cell of head.parentElement.cells) cell.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...Array.from(body.rows).sort(order));
  });
}
for (const choice of document.querySelectorAll("select[data-shades]")) {
  choice.addEventListener("change", () => {
    document.getElementById(choice.dataset.shades).dataset.shade = choice.value;
  });
}
"""
"""Sorts tables by the column that is clicked, and changes what the shading of tokens means."""

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; "
    f"script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"
)
"""What a browser lets the page do: no script but this one runs, and nothing is loaded."""
