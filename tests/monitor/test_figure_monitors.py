"""Monitors of the figures of a run: entropy, KL, a judge beside the reward, and why nothing is learned."""

from __future__ import annotations

import random

import pytest

from monitor.planted import alarms, step_of
from tether.errors import ConfigError
from tether.monitor.entropy import EntropyCollapse
from tether.monitor.judge import JudgeGap
from tether.monitor.kl import KLRunaway
from tether.monitor.stuck import NotLearning
from tether.monitor.usual import actions, usual_monitors
from tether.types import StepResult


def rows(name: str, values) -> list[StepResult]:
    return [StepResult(metrics={name: float(value)}) for value in values]


def test_entropy_that_is_gone():
    ((step, alarm),) = alarms(EntropyCollapse(), rows("entropy", [2.0] * 5 + [1.0] * 10 + [0.1] * 10))
    assert step == 20  # five steps, all of them
    assert "entropy is 0.100 nats per token in steps 16 to 20 and was 2.000" in alarm.message
    assert alarms(EntropyCollapse(), rows("entropy", [2.0] * 5 + [0.3] * 20)) == []
    assert alarms(EntropyCollapse(), [StepResult(metrics={})] * 20) == []


def test_kl_that_runs_away():
    slowly = [0.5 * i for i in range(12)]
    ((step, alarm),) = alarms(KLRunaway(), rows("kl", slowly + [5.5 + 4 * i for i in range(1, 9)]))
    assert step == 14  # 1.5 to 4 in five steps, then to 13.5
    assert "grew by 9.5 nats" in alarm.message
    assert alarms(KLRunaway(), rows("kl", [2.0 * i for i in range(30)])) == []  # steadily


def judged(totals, scores, *, noise: float = 0.05, seed: int = 0) -> list[StepResult]:
    rng = random.Random(seed)
    return [
        step_of([["a", "b"]] * 12, [[total] * 2] * 12, judge=[[score + rng.gauss(0, noise)] * 2 for _ in range(12)])
        for total, score in zip(totals, scores, strict=True)
    ]


def test_a_reward_that_rises_while_the_judge_falls():
    up = [0.1 * i for i in range(30)]
    peak = [0.05 * min(i, 30 - i) for i in range(30)]
    ((step, alarm),) = alarms(JudgeGap(judge="judge"), judged(up, peak))
    assert alarm.monitor == "judge_gap/judge"
    assert 18 <= step <= 22
    assert 16 <= alarm.since <= 19
    assert "while the reward went from" in alarm.message
    assert alarms(JudgeGap(judge="judge"), judged(up, up)) == []
    assert alarms(JudgeGap(judge="judge"), judged([-x for x in up], peak)) == []  # both fall: no over-optimisation
    for seed in range(20):
        assert alarms(JudgeGap(judge="judge"), judged(up, [0.5] * 30, seed=seed)) == []
    assert alarms(JudgeGap(judge="other"), judged(up, peak)) == []


def test_a_judge_that_does_not_change_raises_hardly_any_alarm():
    """The best of many windows is above the mean by chance: at 4 standard errors it was an alarm in 5% of such runs."""
    runs = []
    for seed in range(100):
        rng, monitor = random.Random(seed), JudgeGap(judge="judge")
        up = [step_of([["a"]] * 8, [[0.1 * i]] * 8, judge=[[rng.gauss(0, 1)] for _ in range(8)]) for i in range(100)]
        runs.append(alarms(monitor, up))
    assert sum(bool(found) for found in runs) <= 2


HEALTHY = {
    "reward": 0.5,
    "reward_std": 0.4,
    "completions/clipped_ratio": 0.2,
    "kl": 1.0,
    "kl_coef/effective": 0.05,
    "entropy": 1.5,
    "grad_norm": 0.7,
    "learning_rate": 1e-4,
    "sampling/logprob_gap_mean": 1e-4,
}


def standing(*, rewards=((0.0, 1.0), (1.0, 0.0)), slope: float = 0.0, seed: int = 0, **metrics) -> list[StepResult]:
    """Steps whose reward moves by ``slope`` and noise, with some figures that are not healthy."""
    rng = random.Random(seed)
    return [
        step_of(
            [["a", "b"]] * len(rewards),
            rewards,
            metrics={**HEALTHY, **metrics, "reward": 0.5 + slope * i + rng.gauss(0, 0.02)},
        )
        for i in range(30)
    ]


@pytest.mark.parametrize(
    ("planted", "said", "advised"),
    [
        ({"rewards": ((0.0, 0.0), (0.0, 0.0))}, "never met", "tether sft"),
        ({"rewards": ((0.0, 0.0), (1.0, 1.0))}, "depends on the prompt and not on the completion", "reads"),
        (
            {"completions/clipped_ratio": 1.0, "rewards": ((0.0, 0.0), (0.0, 0.0))},
            "100% of the completions are cut",
            "--max-new-tokens",
        ),
        ({"sampling/logprob_gap_mean": 0.5}, "differ by 0.5 nats", "--mismatch"),
        ({"entropy": 0.001}, "entropy is 0.001", "--temperature"),
        ({"kl": 1e-4, "learning_rate": 1e-9}, "hardly moved", "raise --learning-rate"),
        ({"kl": 1e-4, "grad_norm": 0.0}, "the gradient is 0", "scale"),
        ({"kl": 1e-3, "kl_coef/effective": 100.0}, "held by a kl_coef of 100", "lower --kl-coef"),
        ({"kl": 4.0, "kl_coef/effective": 0.5}, "the KL penalty", "lower --kl-coef"),
        ({"val/explained_variance": -0.2}, "the critic explains", "--value-coef"),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_the_cause_is_named_first(planted, said, advised, seed):
    ((step, alarm),) = alarms(NotLearning(), standing(seed=seed, **planted))
    assert step == 20
    assert "after 20 steps with a mean reward of 0." in alarm.message
    assert said in alarm.message
    assert advised in alarm.advice


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_named_where_nothing_is_wrong(seed):
    assert alarms(NotLearning(), standing(seed=seed)) == []
    assert alarms(NotLearning(), standing(seed=seed, **{"completions/clipped_ratio": 1.0})) == []  # and rewards differ
    assert alarms(NotLearning(), standing(seed=seed, slope=0.01, kl=4.0, **{"kl_coef/effective": 0.5})) == []


def test_a_policy_that_has_not_moved_is_named_whatever_its_rewards_do():
    ((_, alarm),) = alarms(NotLearning(), standing(slope=0.02, kl=1e-4))
    assert "hardly moved" in alarm.message
    assert "without a trend" not in alarm.message


def test_what_an_alarm_does():
    assert not any(actions([]).values())
    assert all(actions(["stop"]).values())
    some = actions(["repetition=stop", "stop", "length_drift=log"])
    assert (some["repetition"], some["length_drift"], some["entropy_collapse"]) == (True, False, True)
    stops = {monitor.name: monitor.stop for monitor in usual_monitors(["judge_gap=stop"], ["a", "b"])}
    assert stops == {name: name.startswith("judge_gap/") for name in stops}
    assert len(stops) == 8
    assert {one.name for one in usual_monitors(compares=True)} - {one.name for one in usual_monitors()} == {
        "flat_rewards"
    }


@pytest.mark.parametrize("value", ["", "halt", "repetition", "repetition=", "repetitoin=stop", "=stop", "stop=log"])
def test_any_other_action_is_refused(value):
    with pytest.raises(ConfigError, match="is neither log, stop nor NAME=log") as found:
        actions([value])
    assert "phrase_takeover" in str(found.value)
