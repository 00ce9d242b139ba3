"""What is compared with what, by which figure, and what is said about it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from commandline import tether, write_rows
from evaluated import evaluated_run, flat_scores, noisy_scores
from tether.errors import ConfigError
from tether.report.comparison import as_written, chosen_figure, compare, named_figure
from tether.report.held_out import differences, read_candidates, win_shares
from tether.report.verdict import digits_for, notes, percent, plus_minus, rounded, verdicts
from tether.statistics import Estimate, mean_interval

BASE = flat_scores(0.0)


def runs(tmp_path: Path, **levels: float) -> list[Path]:
    """Runs whose policies have these mean scores."""
    return [
        evaluated_run(tmp_path / name, noisy_scores(level, i), BASE, kl=2.0 * i, seed=i)
        for i, (name, level) in enumerate(levels.items())
    ]


def test_figures_of_a_run_by_hand(tmp_path):
    """Two prompts: the policy's means are 1 and 2, the reference's 0 and 2; with the same seeds it wins 2 of 2 and ties
    or wins 1 of 2."""
    path = evaluated_run(tmp_path / "a", {"x": [1, 1], "y": [1, 3]}, {"x": [0, 0], "y": [1, 3]}, kl=2.5)
    (found,) = compare(read_candidates([path])).standings
    assert found.source == "held-out completions"
    assert (found.reward.value, found.against_reference.value) == (1.5, 0.5)
    assert found.against_reference.half_width == pytest.approx(12.7062 * math.sqrt(0.5) / math.sqrt(2), rel=1e-5)
    assert found.wins.value == (1 + 0.5) / 2
    assert (found.kl, found.length, found.seconds, found.prompts, found.completions) == (2.5, 2.0, 41.0, 2, 4)


def test_the_pairing_unit_is_the_prompt(tmp_path):
    """Twice the completions, with the same means, do not make an interval narrower."""
    once = evaluated_run(tmp_path / "a", {"x": [1], "y": [2], "z": [4]}, {"x": [0], "y": [0], "z": [0]})
    twice = evaluated_run(tmp_path / "b", {"x": [1] * 2, "y": [2] * 2, "z": [4] * 2}, {k: [0, 0] for k in "xyz"})
    a, b = (compare(read_candidates([path])).standings[0].against_reference for path in (once, twice))
    assert a == b


def test_completions_of_other_seeds_are_compared_each_with_each(tmp_path):
    a = evaluated_run(tmp_path / "a", {"x": [1.0, 0.0]}, {"x": [0.0, 0.0]}, seed=0)
    b = evaluated_run(tmp_path / "b", {"x": [1.0, 0.0]}, {"x": [0.0, 0.0]}, seed=0)
    c = evaluated_run(tmp_path / "c", {"x": [0.0, 1.0]}, {"x": [0.0, 0.0]}, seed=1)
    d = evaluated_run(tmp_path / "d", {"x": [0.0, 1.0, 1.0]}, {"x": [0.0, 0.0, 0.0]}, seed=0)
    models = [one.policy for one in read_candidates([a, b, c, d])]
    assert win_shares(models[0], models[1], "score") == [0.5]  # two ties
    assert win_shares(models[0], models[2], "score") == [0.5]  # a win, a loss, two ties
    assert win_shares(models[0], models[3], "score") == [pytest.approx((1 + 0.5 + 0.5 + 0.5 + 0 + 0) / 6)]


def test_completions_without_a_reward_are_left_out(tmp_path):
    path = evaluated_run(tmp_path / "a", {"x": [1.0, None], "y": [None, None]}, {"x": [0.0, 5.0], "y": [1.0, 1.0]})
    (one,) = read_candidates([path])
    assert differences(one.policy, one.reference, "score") == [1.0 - 2.5]
    assert win_shares(one.policy, one.reference, "score") == [1.0]


def test_methods_are_ordered_and_seeds_are_not(tmp_path):
    found = compare(read_candidates(runs(tmp_path, low=0.0, high=1.0, same=1.0)))
    first, second = found.pairs[0].a, found.pairs[0].b
    assert {first, second} == {"high", "same"}
    assert [(pair.a, pair.b, pair.more_completions == 0) for pair in found.pairs] == [
        (first, second, False),
        (first, "low", True),
        (second, "low", True),
    ]
    said = verdicts(found)
    assert said[0].startswith(f"{first} and {second} cannot be told apart ({first} is higher by 0.0")
    assert "more completions of each would do." in said[0]
    high = next(one for one in said if one.startswith("high is better than low by "))
    assert high.endswith("at 2.0 nats more.")


def test_the_intervals_of_several_pairs_hold_together(tmp_path):
    alone = compare(read_candidates(runs(tmp_path / "two", a=0.0, b=0.3)))
    among = compare(read_candidates(runs(tmp_path / "three", a=0.0, b=0.3, c=0.6)))
    assert (alone.level, among.level) == (pytest.approx(0.95), pytest.approx(1 - 0.05 / 3))
    narrow, wide = (next(p for p in one.pairs if {p.a, p.b} == {"a", "b"}).difference for one in (alone, among))
    assert narrow.value == wide.value
    assert narrow.half_width < wide.half_width
    one, two = (read_candidates([tmp_path / "three" / name])[0].policy for name in "ba")
    assert wide == mean_interval(differences(one, two, "score"), level=1 - 0.05 / 3)
    assert "Bonferroni: 98.3% each" in " ".join(notes(among))


def test_the_completions_that_would_do_are_on_further_prompts(tmp_path):
    found = compare(read_candidates(runs(tmp_path, a=0.0, b=0.0)))
    (pair,) = found.pairs
    needed = ((1.959964 + 0.841621) * pair.difference.std / pair.difference.value) ** 2
    assert needed > 16
    assert pair.more_completions == pytest.approx(2 * (needed - 16), rel=0.1, abs=8)  # two completions of each


def test_runs_that_differ_in_the_seed_alone_say_how_much_training_varies(tmp_path):
    a = evaluated_run(tmp_path / "a", flat_scores(0.0), BASE, seed=1)
    b = evaluated_run(tmp_path / "b", flat_scores(1.0, spread=0.12), BASE, seed=2)
    for path, seed in ((a, 1), (b, 2)):
        (path / "config.yaml").write_text(f"command: grpo\nreward: [r.py:fn]\nseed: {seed}\nout: {path}\n")
    found = compare(read_candidates([a, b]))
    assert found.pairs[0].seed_alone
    assert "in the seed alone" in verdicts(found)[0]


def test_different_rewards_are_not_compared(tmp_path):
    a = evaluated_run(tmp_path / "a", flat_scores(0.0), BASE)
    b = evaluated_run(tmp_path / "b", flat_scores(1.0), BASE, reward=["other.py:fn"])
    found = compare(read_candidates([a, b]))
    assert found.pairs == ()
    (why,) = found.excluded
    assert why == "a and b are not compared: score is 1 * r.py:fn in one and 1 * other.py:fn in the other"
    assert all(one.reward is not None for one in found.standings)


def test_a_judge_that_all_share_is_what_they_are_compared_by(tmp_path):
    judge = {prompt: [0.5, 0.7] for prompt in BASE}
    paths = [
        evaluated_run(tmp_path / name, flat_scores(1.0), BASE, judge=judge, reward=[reward], eval_reward=["j.py:judge"])
        for name, reward in (("a", "r.py:fn"), ("b", "other.py:fn"))
    ]
    candidates = read_candidates(paths)
    found = compare(candidates)
    assert (found.figure, found.trained_on, len(found.pairs)) == ("rewards/judge", False, 1)
    assert compare(candidates, by="score").pairs == ()
    assert named_figure(candidates, "judge") == "rewards/judge"
    with pytest.raises(ConfigError, match="there are: score, fn, judge"):
        named_figure(candidates, "quality")


def test_one_reward_model_in_two_places_is_one_reward(tmp_path):
    paths = [evaluated_run(tmp_path / name, flat_scores(1.0), BASE, reward=[f"{name}/fn/model"]) for name in ("a", "b")]
    assert compare(read_candidates(paths)).pairs == ()
    for path in paths:
        (path / "fingerprints.json").write_text(json.dumps({"reward fn": "77"}))
    assert len(compare(read_candidates(paths)).pairs) == 1


def test_other_prompts_are_not_compared_and_shared_ones_are(tmp_path):
    a = evaluated_run(tmp_path / "a", flat_scores(0.0), BASE)
    other = {f"q{i}": row for i, row in enumerate(flat_scores(1.0).values())}
    b = evaluated_run(tmp_path / "b", other, other)
    assert "share fewer than two held-out prompts" in compare(read_candidates([a, b])).excluded[0]
    half = {prompt: row for i, (prompt, row) in enumerate(flat_scores(1.0).items()) if i < 6}
    c = evaluated_run(tmp_path / "c", half, half)
    assert compare(read_candidates([a, c])).pairs[0].difference.prompts == 6


def test_kl_to_another_reference_is_not_compared(tmp_path):
    paths = runs(tmp_path, a=0.0, b=1.0)
    assert compare(read_candidates(paths)).pairs[0].kl == 2.0
    (paths[0] / "fingerprints.json").write_text(json.dumps({"model": "1"}))
    assert compare(read_candidates(paths)).pairs[0].kl is None


def test_a_run_without_held_out_completions_is_said_to_have_none(tmp_path):
    rows = [{"step": float(i), "reward": float(i), "kl": 2.0} for i in range(1, 11)]
    path = evaluated_run(tmp_path / "a", BASE, BASE, rows=rows)
    (path / "evaluation.parquet").unlink()
    other = evaluated_run(tmp_path / "b", BASE, BASE)
    found = compare(read_candidates([path, other]))
    assert (found.standings[0].source, found.standings[0].reward.value) == ("training samples", 9.5)  # the last fifth
    assert found.standings[0].kl == 2.0
    assert found.excluded == ("a: no held-out completions, so not compared with the others",)
    assert "not held-out" in " ".join(notes(found))


def test_an_unfinished_run_says_how_far_it_is(tmp_path):
    path = evaluated_run(tmp_path / "a", BASE, BASE, rows=[{"step": 1.0, "reward": 0.5}], steps=20)
    for name in ("evaluation.parquet", "summary.json"):
        (path / name).unlink()
    said = f"a: interrupted at step 1 of 20 (tether resume {path})"
    assert compare(read_candidates([path])).excluded == (said,)
    other = evaluated_run(tmp_path / "b", BASE, BASE)
    assert compare(read_candidates([path, other])).excluded == (f"{said}, so not compared with the others",)


def test_a_step_that_was_chosen_on_these_prompts_is_noted(tmp_path):
    paths = [
        evaluated_run(tmp_path / name, BASE, BASE, keep_best=metric)
        for name, metric in (("a", "-eval/kl"), ("b", "reward"))
    ]
    for path in paths:
        (path / "summary.json").write_text(json.dumps({"seconds": 1.0, "best": {"step": 2, "value": 0.5}}))
    said = notes(compare(read_candidates(paths)))
    assert [one for one in said if "optimistic" in one] == [
        "The step of a was chosen on these prompts, so its figure is optimistic."
    ]
    assert any("not training" in one for one in notes(compare(read_candidates(paths[:1]))))


def test_a_run_with_a_summary_alone_has_its_figures(tmp_path):
    path = evaluated_run(tmp_path / "a", BASE, BASE)
    (path / "evaluation.parquet").unlink()
    figures = {"reward": 0.7, "reward_ci95": 0.1, "kl": 3.0, "win_rate": 0.6, "mean_length": 9.0, "distinct_2": 0.9}
    (path / "summary.json").write_text(json.dumps({"evaluation": {"policy": figures, "eval_rewards": {}}}))
    (found,) = compare(read_candidates([path])).standings
    assert (found.source, found.kl, found.length) == ("held-out summary", 3.0, 9.0)
    assert plus_minus(found.reward) == "0.70 ± 0.10"


def test_a_figure_that_none_was_trained_on_is_preferred(tmp_path):
    gold = {prompt: [0.5, 0.7] for prompt in BASE}
    path = evaluated_run(tmp_path / "a", BASE, BASE, judge=gold, reward=["r.py:fn", "judge:=length:3=0"])
    assert chosen_figure(read_candidates([path])) == "rewards/judge"


@pytest.mark.parametrize(
    ("value", "half", "shown"),
    [
        (0.446, 0.0491, "0.446 ± 0.049"),
        (12.3456, 1.2, "12.3 ± 1.2"),
        (1234.0, 56.0, "1234 ± 56"),
        (0.5, math.inf, "0.500"),
    ],
)
def test_figures_have_the_digits_of_their_intervals(value, half, shown):
    assert plus_minus(Estimate(value=value, low=value - half, high=value + half, prompts=9, std=1.0)) == shown


def test_digits_and_counts():
    assert [digits_for(half) for half in (0.0, 1e-9, 0.05, 0.5, 5.0, 500.0)] == [3, 6, 3, 2, 1, 0]
    assert [rounded(count) for count in (7, 99, 432, 6841)] == [7, 99, 430, 6800]
    assert percent(Estimate(value=0.75, low=0.686, high=0.8, prompts=9, std=0.1)) == "75% (69–80)"


def test_options_are_shown_as_they_are_written():
    values = (None, True, False, 1e-05, 0.5, 3, "base", ["a", "b=0.5"], [])
    assert [as_written(value) for value in values] == [
        "none", "true", "false", "1e-05", "0.5", "3", "base", "a b=0.5", "none",
    ]  # fmt: skip


def a_quickstart(path: Path) -> Path:
    """The directory of a quickstart with two methods."""
    path.mkdir()
    (path / "config.yaml").write_text("command: quickstart\n")
    rows = [
        {"method": method, "prompt": f"p{i}", "completion": "c", "gold": level * (1 + 0.1 * (-1) ** i), "proxy": 0.0}
        for method, level in (("base", 0.0), ("ppo", 0.5))
        for i in range(8)
    ]
    write_rows(path / "samples.jsonl", rows)
    figures = {"kl": 3.0, "mean_length": 9.0, "seconds": 41.0}
    (path / "summary.json").write_text(json.dumps({"methods": {"base": {**figures, "kl": 0.0}, "ppo": figures}}))
    (path / "ppo").mkdir()
    (path / "ppo" / "config.yaml").write_text("command: ppo\n")
    return path


def test_a_quickstart_stands_for_its_methods(tmp_path, capsys):
    path = a_quickstart(tmp_path / "qs")
    found = compare(read_candidates([path]))
    assert [one.name for one in found.standings] == ["base", "PPO"]
    assert (found.figure, found.standings[1].against_reference.value) == ("rewards/gold", pytest.approx(0.5))
    assert (
        verdicts(found) == ["PPO is better than base by 0.500 at 3.0 nats more."]
        or "PPO is better" in verdicts(found)[0]
    )
    other = a_quickstart(tmp_path / "other")
    assert [one.name for one in read_candidates([path, other])] == ["qs/base", "qs/PPO", "other/base", "other/PPO"]
    assert tether("compare", path) == 0
    assert "PPO is better than base" in capsys.readouterr().out
