"""The quickstart at toy sizes: what it writes, and that its annotator draws as it says."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from helpers import group, scored
from tether.annotator import Annotator, ceiling
from tether.quickstart import METHODS, Settings, quickstart
from tether.types import Sampling

FIGURES = {"gold_reward", "gold_ci95", "proxy_reward", "kl", "win_rate", "mean_length", "distinct_2", "seconds"}


def small() -> Settings:
    settings = Settings()
    sampling = Sampling(max_new_tokens=10, temperature=0.8)
    return replace(
        settings,
        train_prompts=6,
        judged_prompts=2,
        eval_prompts=3,
        eval_completions=2,
        completions_per_prompt=16,
        least_difference=0.01,
        sampling=sampling,
        reward=replace(settings.reward, batch_size=8),
        rejection_sampling=replace(settings.rejection_sampling, group_size=4, top_k=1, sampling=sampling),
        steps=2,
        prompts_per_step=2,
        ppo=replace(settings.ppo, group_size=2, sampling=sampling),
        grpo=replace(settings.grpo, group_size=2, sampling=sampling),
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "run"
    return out, quickstart(out, small())


def test_the_summary_holds_every_figure_of_every_method(done, capsys):
    out, returned = done
    summary = json.loads((out / "summary.json").read_text())
    assert summary == returned
    assert set(summary["methods"]) == set(METHODS)
    for row in summary["methods"].values():
        assert set(row) == FIGURES
    assert {"pairs", "accuracy", "ceiling"} <= summary["reward_model"].keys()
    base = summary["methods"]["base"]
    assert (base["kl"], base["win_rate"], base["seconds"]) == (0.0, 0.5, 0.0)
    assert summary["methods"]["grpo"]["kl"] > 0


def test_the_report_needs_nothing_but_itself(done):
    out, _ = done
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 3
    assert not re.search(r'(src|href)="(?!#|data:)', page)
    assert page.count("<script") == 1
    for row in map(json.loads, (out / "samples.jsonl").read_text().splitlines()):
        assert set(row) == {"method", "prompt", "completion", "gold", "proxy"}


def test_every_stage_is_a_run_of_its_own(done):
    out, _ = done
    for stage in ("reward", *METHODS[1:]):
        assert {"config.yaml", "metrics.jsonl", "summary.json", "model"} <= {p.name for p in (out / stage).iterdir()}


def texts(rows, totals):
    """Groups whose completions have texts to show to the annotator."""
    plain = group([0], rows)
    named = tuple(replace(c, text=f"text {i}") for i, c in enumerate(plain.completions))
    return [scored(replace(plain, completions=named), totals)]


def test_the_annotator_draws_by_bradley_terry():
    annotator = Annotator(sharpness=2.0, least_difference=0.3, seed=0)
    assert annotator.probability(0.0) == 0.5
    assert annotator.probability(0.5) == pytest.approx(0.7310586)  # sigmoid(1)
    rows = [[3], [4]] * 2000
    pairs = list(annotator.pairs(texts(rows, [0.5, 0.0] * 2000)))
    better = sum(int(pair["chosen"].split()[1]) % 2 == 0 for pair in pairs) / len(pairs)
    assert better == pytest.approx(0.731, abs=0.03)  # three standard errors
    assert [pair["clear"] for pair in pairs] == pytest.approx([0.7310586] * len(pairs))
    assert ceiling(pairs) == pytest.approx(0.7310586)


def test_the_annotator_is_not_shown_near_ties():
    annotator = Annotator(sharpness=2.0, least_difference=0.3, seed=0)
    pairs = list(annotator.pairs(texts([[3], [4], [5], [6]], [0.2, 0.0, 0.0, 0.9])))
    assert [{pair["chosen"], pair["rejected"]} for pair in pairs] == [
        {"text 1", "text 3"}
    ]  # 0.9 apart; 0.2 is too little
