"""``tether frontier``: runs against their distance, where another reward peaks, and best of n."""

from __future__ import annotations

import json
import math
import random

import pytest

from commandline import tether, workspace, write_rows
from tether.report.frontier import PROXY, Line, Point, at_equal_compute, at_equal_kl, trade_offs


def a_run(path, *, peak: float | None, seed: int = 0, steps: int = 30, parts: tuple[str, ...] = ("judge",)) -> None:
    """A run whose proxy rises with d and whose judge peaks at a KL of ``peak``."""
    rng = random.Random(seed)
    path.mkdir()
    (path / "config.yaml").write_text(
        "command: grpo\ngroup_size: 4\nprompts_per_step: 8\nreward: ['r.py:fn', 'j.py:judge=0']\n"
    )
    rows = []
    for step in range(1, steps + 1):
        d = math.sqrt(0.5 * (step - 1))
        b = 1 / (1 + math.log(peak) / 2) if peak else -0.2  # exp(a / b - 1) = sqrt(peak) at a = 1
        judge = 0.1 + d * (1 - b * (math.log(d) if d else 0)) + rng.gauss(0, 0.02)
        figures = {"step": step, "kl": d * d, "reward": d + rng.gauss(0, 0.02), "reward_std": 0.1, "num_tokens": 100.0}
        rows.append(
            figures
            | {f"rewards/{part}/{what}": value for part in parts for what, value in (("mean", judge), ("std", 0.1))}
        )
    write_rows(path / "metrics.jsonl", rows)


def test_the_peak_of_the_judge_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "hacked", peak=6.0)
    a_run(tmp_path / "sound", peak=None, seed=1)
    assert tether("frontier hacked sound --json --out f") == 0
    data = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "f" / "frontier.json").read_text()) == data
    assert (tmp_path / "f" / "frontier.png").stat().st_size > 10_000
    hacked, sound = data["lines"]
    fit = hacked["fits"]["judge"]
    assert fit["peak_within_data"]
    assert fit["peak_kl_low"] <= 6.0 <= fit["peak_kl_high"]
    assert fit["peak_kl"] == pytest.approx(6.0, rel=0.2)
    assert not sound["fits"]["judge"]["peak_within_data"]
    assert len(hacked["points"]) == 30
    assert hacked["points"][3]["judge"]["ci95"] == pytest.approx(1.96 * 0.1 / math.sqrt(32))
    assert [row["name"] for row in data["equal_compute"]] == ["hacked", "sound"]
    assert len(data["equal_kl"]) == 4
    assert data["equal_kl"][-1]["sound"]["reward"] > data["equal_kl"][-1]["hacked"]["reward"]


def test_it_says_so_in_words(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "hacked", peak=6.0)
    a_run(tmp_path / "short", peak=6.0, steps=3)
    assert tether("frontier hacked short") == 0
    said = capsys.readouterr().out
    assert "peak of the fit" in said
    assert "too few points" in said
    assert not (tmp_path / "frontier.json").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("frontier hacked --gold other", "not all runs have the reward 'other'"),
        ("frontier hacked --best-of 1", "best_of must be 0, or at least 2"),
        ("frontier nowhere", "not a run"),
        ("frontier empty", "has no steps with a reward and a KL"),
    ],
)
def test_what_is_refused(line, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "hacked", peak=6.0)
    a_run(tmp_path / "empty", peak=6.0, steps=0)
    assert tether(line) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_best_of_n_of_the_base(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    line = "grpo --prompts p.jsonl --reward r.py:fn --reward length:3=0 --group-size 2 --steps 2 --prompts-per-step 2"
    assert tether(f"{line} --max-new-tokens 4 --quiet --out out --model", tiny) == 0
    capsys.readouterr()
    assert tether("frontier out --best-of 32 --best-of-prompts 3 --json") == 0
    _, best = json.loads(capsys.readouterr().out)["lines"]
    assert [point["label"] for point in best["points"]] == [f"best of {n}" for n in (1, 2, 4, 8, 16, 32)]
    proxy = [point[PROXY]["reward"] for point in best["points"]]
    assert proxy == sorted(proxy)
    for n, point in zip((1, 2, 4, 8, 16, 32), best["points"], strict=True):
        assert -1e-9 <= point["kl"] <= math.log(n) + 1e-9
        assert "length" in point


def line(name: str, points: list[tuple[float, float, float]]) -> Line:
    """From (d, reward, tokens)."""
    found = [Point(label="", kl=d * d, rewards={"g": (r, 0.1), "h": (-r, 0.1)}, tokens=t) for d, r, t in points]
    return Line(name=name, curve="rl", points=found).fitted(["g"])


def test_equal_kl_and_equal_compute():
    slow = line("slow", [(0.1 * i, 0.2 * i, 10.0 * i) for i in range(10)])
    fast = line("fast", [(0.2 * i, 0.3 * i, 20.0 * i) for i in range(10)])
    *_, last = at_equal_kl([slow, fast], "g")
    assert last["kl"] == pytest.approx(0.81)
    assert last["slow"]["reward"] == pytest.approx(1.8)
    assert last["fast"]["reward"] == pytest.approx(1.35)
    one, two = at_equal_compute([slow, fast], "g")
    assert (one["tokens"], two["tokens"]) == (90.0, 80.0)
    assert one["reward"] == pytest.approx(0.2 * 7)  # the last five of ten
    assert two["reward"] == pytest.approx(0.3 * 2)
    assert one["ci95"] == pytest.approx(1.96 * 0.1 / math.sqrt(5))


def test_the_pareto_front():
    runs = [line("a", [(0.0, 1.0, 1.0)]), line("b", [(0.0, 2.0, 1.0)])]
    assert [row["on_the_front"] for row in trade_offs(runs, ["g", "h"])] == [True, True]  # each is best in one
    assert [row["on_the_front"] for row in trade_offs(runs, ["g"])] == [False, True]
