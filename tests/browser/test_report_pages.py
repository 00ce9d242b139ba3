"""Report pages in a real browser: no error in its console, every figure in sight, tables that sort, nothing loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from commandline import tether, workspace, write_rows

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed")

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-quic",
)  # fmt: skip
TASK = "--prompts p.jsonl --eval-prompts held_prompts.jsonl --reward r.py:fn --reward length:3=0.5 --max-new-tokens 6"
FILLS = "return [...document.querySelectorAll('svg text')].map(one => getComputedStyle(one).fill)"
BACKGROUNDS = "return [...document.querySelectorAll('#samples span')].map(one => getComputedStyle(one).backgroundColor)"
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tiny, tmp_path_factory) -> dict[str, Path]:
    """The page of a run with an alarm and hostile text, of a reward model, and of two runs."""
    place = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        workspace(place)
        rows = [json.loads(line) for line in (place / "p.jsonl").read_text().splitlines()]
        write_rows(place / "p.jsonl", [{**row, "prompt": f"{row['prompt']} {HOSTILE}"} for row in rows])
        run = (
            f"grpo {TASK} --group-size 3 --steps 3 --prompts-per-step 2 --rollouts-every 1 --learning-rate 0.1 --quiet"
        )
        assert tether(f"{run} --out one --model", tiny) == 0
        assert tether(f"{run} --out two --seed 1 --model", tiny) == 0
        write_rows(place / "one" / "alarms.jsonl", [{"step": 2, "monitor": "m", "message": HOSTILE, "stop": False}])
        assert tether("reward --pairs pairs.jsonl --batch-size 8 --quiet --out judge --model", tiny) == 0
        for line in ("report one", "report judge", "report one two --out both.html"):
            assert tether(line) == 0
    return {"run": place / "one/report.html", "reward": place / "judge/report.html", "runs": place / "both.html"}


def opened(browser: Any, page: Path, *, width: int = 1100, dark: bool = False) -> None:
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1100, 390], ids=["desktop", "phone"])
@pytest.mark.parametrize("name", ["run", "reward", "runs"])
def test_a_page_shows_all_that_it_has(browser, pages, name, width, dark):
    opened(browser, pages[name], width=width, dark=dark)
    assert browser.get_log("browser") == []
    assert browser.title.startswith("tether")  # what a completion holds is text
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('svg')].map(one => { const b = one.getBoundingClientRect();"
        "return [b.left, b.right, b.width, b.height, one.querySelectorAll('path').length]; })"
    )
    assert len(boxes) >= 2
    for left, right, wide, high, paths in boxes:
        assert 0 <= left < right <= width
        assert min(wide, high) > 150
        assert paths > 5
    ink, back = browser.execute_script("const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]")
    assert (brightness(ink) > brightness(back)) == dark
    assert abs(brightness(ink) - brightness(back)) > 0.6
    assert set(browser.execute_script(FILLS)) == {ink}


def brightness(colour: str) -> float:
    """Of ``rgb(r, g, b)``, 0 to 1."""
    parts = colour.partition("(")[2].rstrip(")").split(",")
    return sum(float(part) for part in parts[:3]) / 765


def test_a_click_sorts_and_the_shading_can_be_changed(browser, pages):
    opened(browser, pages["run"])
    buttons = browser.find_elements("css selector", "#samples th button")
    assert {"reward", "kl", "tokens"} <= {button.text.rstrip(" ↑↓") for button in buttons}
    for column, button in enumerate(buttons):
        before = texts(browser)
        for down in (True, False):
            button.click()
            values = column_of(browser, column)
            assert values == sorted(values, reverse=down)
            assert len(set(values)) > 1 or len(values) > 1
        assert sorted(texts(browser)) == sorted(before)
    colours = []
    for choice in ("kl", "advantage", ""):
        select = browser.find_element("css selector", "select[data-shades=samples]")
        select.find_element("css selector", f"option[value='{choice}']").click()
        colours.append(browser.execute_script(BACKGROUNDS))
    assert len(set(map(tuple, colours))) == 3
    assert set(colours[2]) == {"rgba(0, 0, 0, 0)"}
    assert browser.get_log("browser") == []


def column_of(browser: Any, column: int) -> list[float]:
    found = browser.execute_script(
        "return [...document.querySelectorAll('#samples tbody tr')].map(r => r.cells[arguments[0]].dataset.value)",
        column,
    )
    return [float(value) for value in found]


def texts(browser: Any) -> list[str]:
    return browser.execute_script("return [...document.querySelectorAll('#samples td.said')].map(t => t.textContent)")


def test_no_other_script_runs(browser, pages, tmp_path):
    """Even where markup got into a page."""
    page = tmp_path / "page.html"
    page.write_text(pages["run"].read_text("utf-8").replace("</body>", f"{HOSTILE}</body>"), "utf-8")
    opened(browser, page)
    assert browser.title.startswith("tether")
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))
