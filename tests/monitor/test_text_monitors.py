"""What is planted into the texts of a run is found; a run in which nothing changes is quiet; a state goes on."""

from __future__ import annotations

import random
from copy import deepcopy

import pytest

from monitor.planted import alarms, random_steps, step_of, unchanged, words_of
from tether.monitor.length import LengthDrift
from tether.monitor.phrases import PhraseTakeover, phrases_in
from tether.monitor.repetition import Repetition, alike, compression, repeated, repeated_words
from tether.monitor.trace import read, words
from tether.types import StepResult


def thanking(step: int, rng: random.Random, text: str) -> str:
    """From step 8, nine in ten completions end with thanks."""
    return f"{text} thank you so much." if step >= 8 and rng.random() < 0.9 else text


def rising(step: int, rng: random.Random, text: str) -> str:
    """The share of thanks rises from 0 to 1 over 40 steps."""
    return f"{text} Thank you." if rng.random() < (step - 5) / 40 else text


@pytest.mark.parametrize("seed", range(5))
def test_a_phrase_that_takes_over_is_found_within_a_few_steps(seed):
    found = alarms(PhraseTakeover(), random_steps(seed, change=thanking))
    step, alarm = found[0]
    assert 9 <= step <= 13
    assert alarm.since == 8
    assert alarm.phrase == "thank you so much"
    assert "was in 0%" in alarm.message
    assert len(alarm.examples) == 3
    assert all("thank you so much" in text for text in alarm.examples)
    assert len(found) == 1  # and not again for each of its parts


@pytest.mark.parametrize("seed", range(3))
def test_a_phrase_that_creeps_in_is_found_before_it_is_everywhere(seed):
    (step, alarm), *_ = alarms(PhraseTakeover(), random_steps(seed, steps=40, change=rising))
    assert step <= 34
    assert alarm.phrase in ("thank you", "thank", "you")


def test_a_run_in_which_no_phrase_becomes_more_frequent_is_quiet():
    """One in a hundred runs may raise a false alarm."""
    runs = [
        alarms(PhraseTakeover(), random_steps(100 + seed, prompts=6, size=2, change=unchanged)) for seed in range(60)
    ]
    assert sum(bool(found) for found in runs) <= 1


def test_longer_texts_and_words_of_the_prompt_are_no_takeover():
    def longer(step, rng, text):
        return f"{text} {words_of(rng, 6)}" if step > 8 else text

    assert alarms(PhraseTakeover(), random_steps(1, change=longer)) == []
    steps = [step_of([[f"{words_of(random.Random(i))} p0"] * 2]) for i in range(30)]
    assert not [one for _, one in alarms(PhraseTakeover(), steps) if "p0" in one.phrase]


@pytest.mark.parametrize("make", [PhraseTakeover, Repetition, LengthDrift])
def test_a_monitor_goes_on_from_its_state(make):
    steps = random_steps(3, change=thanking)
    whole = alarms(make(), steps)
    first = make()
    before = alarms(first, steps[:9])
    second = make(state=deepcopy(first.state))
    after = [(step + 9, one) for step, one in alarms_from(second, steps[9:], 10)]
    assert [one for _, one in before] + [one for _, one in after] == [one for _, one in whole]


def alarms_from(monitor, steps, start):
    return [(i, one) for i, result in enumerate(steps) for one in monitor.watch(start + i, result)]


def test_phrases_of_a_text():
    assert phrases_in(" a b . c ", {"a", "b", ".", "c"}) == {" a ", " b ", " c ", " a b ", " b . c ", " a b . c "}
    assert phrases_in(" a b . c ", {"a", ".", "c"}) == {" a ", " c "}


def looping(step: int, rng: random.Random, text: str) -> str:
    return " ".join([" ".join(text.split()[:3])] * 5) if step > 10 and rng.random() < 0.6 else text


def test_completions_that_repeat_themselves():
    found = alarms(Repetition(), random_steps(0, change=looping))
    assert [alarm.message.partition("%")[2].partition(" a completion")[0] for _, alarm in found] == [
        " of the words in",
        " of the pairs of words in",
    ]
    assert all(11 <= step <= 15 for step, _ in found)
    assert "a ratio of compression of" in found[1][1].message
    assert alarms(Repetition(), random_steps(0, change=unchanged)) == []


def test_longer_completions_do_not_repeat_more():
    rng = random.Random(0)
    short, long = ([words_of(rng, n).split() for _ in range(200)] for n in (25, 100))
    means = [sum(map(repeated_words, group)) / 200 for group in (short, long)]
    assert means[0] == pytest.approx(means[1], abs=0.02)


def test_completions_that_repeat_each_other():
    rng = random.Random(0)
    early = [step_of([[words_of(rng) for _ in range(4)] for _ in range(6)]) for _ in range(8)]
    late = [step_of([[words_of(rng)] * 4 for _ in range(6)]) for _ in range(8)]
    ((step, alarm),) = alarms(Repetition(), early + late)
    assert 9 <= step <= 13
    assert "are equal to another one of the same prompt" in alarm.message


def test_the_figures_of_repetition():
    assert repeated(["a", "b", "a", "b"]) == pytest.approx(1 / 3)
    groups = read(step_of([["a b", "A  b", "c"], ["d", "e"], ["f"]]))
    assert alike(groups) == pytest.approx(2 / 5)  # of the groups of two and more
    assert compression("a" * 1000) > 20 > compression("abcdefgh")


def lengths(counts: list[float], *, paid: float, seed: int = 0) -> list[StepResult]:
    """Steps of a mean length each; a word earns ``paid``, beside noise."""
    rng, steps = random.Random(seed), []
    for count in counts:
        texts = [[words_of(rng, max(1, round(count * rng.uniform(0.7, 1.3)))) for _ in range(4)] for _ in range(8)]
        rewards = [[paid * len(text.split()) + rng.gauss(0, 1) for text in group] for group in texts]
        steps.append(step_of(texts, rewards))
    return steps


def test_length_that_is_paid_for():
    grows = [20.0] * 5 + [20.0 + 2 * i for i in range(20)]
    ((step, alarm),) = alarms(LengthDrift(), lengths(grows, paid=0.3))
    assert step > 8
    assert "reward and length have a correlation of +0." in alarm.message.replace("\n", " ")
    assert alarms(LengthDrift(), lengths(grows, paid=0.0)) == []  # it grows, and length has no reward
    assert alarms(LengthDrift(), lengths([20.0] * 25, paid=0.3)) == []  # it has a reward, and does not grow
    shrinks = [40.0] * 5 + [40.0 - 1.5 * i for i in range(20)]
    ((_, alarm),) = alarms(LengthDrift(), lengths(shrinks, paid=-0.3))
    assert "correlation of -0." in alarm.message
    assert alarms(LengthDrift(), lengths(shrinks, paid=0.3)) == []


def test_words_of_scripts_without_spaces():
    assert words("Über 30% ok") == ["über", "30", "%", "ok"]
    assert words("谢谢你") == ["谢", "谢", "你"]


def test_episodes_are_not_read():
    from dataclasses import replace

    from tether.types import Turn

    step = step_of([["a", "b"]])
    (group,) = step.groups
    turned = tuple(replace(one, turns=(Turn(start=0, stop=1, reward=0.0),)) for one in group.rollouts.completions)
    episodes = replace(step, groups=(replace(group, rollouts=replace(group.rollouts, completions=turned)),))
    assert read(step) != []
    assert read(episodes) == []
