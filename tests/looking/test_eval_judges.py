"""``tether eval`` of reward models: where they are right, several on the same pairs, and what they refuse."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

from commandline import tether, write_rows
from tether.algorithms.reward_model import score_pairs
from tether.data.reading import Place, Row
from tether.looking.judges import Judged, column, comparisons, in_full, measured, turned
from tether.models.loading import load_tokenizer
from tether.models.reward import load_reward_model, new_reward_model, save_reward_model
from tether.statistics import mean_interval
from tether.types import PreferencePair


def judged(differences, *, name="judge", rows=None, longer=None) -> Judged:
    """Pairs of different prompts with these score differences; the chosen side has ``longer`` tokens more."""
    longer = longer or [0] * len(differences)
    pairs = [
        PreferencePair(prompt_ids=(0, 5 + i), chosen_ids=(7,) * (10 + extra), rejected_ids=(8,) * 10)
        for i, extra in enumerate(longer)
    ]
    rows = range(len(pairs)) if rows is None else rows
    scores = torch.stack([torch.tensor(differences), torch.zeros(len(pairs))])
    return Judged(name=name, pairs=pairs, rows=[row_of(i) for i in rows], values=[], scores=scores)


def row_of(number: int, **values) -> Row:
    return Row(where=Place("pairs.jsonl", number, "line"), values=values)


@pytest.fixture
def here(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("one", "two")):
        model, tokenizer = new_reward_model(tiny, seed=seed)
        save_reward_model(model, tokenizer, tmp_path / name, [((0, 5), (6, 1)), ((0, 7), (8, 1))])
    rows = [
        {"prompt": f"Q{i}", "chosen": " yes" * (1 + i % 3), "rejected": f" no {i}", "kind": "ab"[i % 2]}
        for i in range(12)
    ]
    write_rows(tmp_path / "pairs.jsonl", rows)
    return tmp_path


def found(capsys, line: str) -> dict:
    assert tether(line) == 0
    return json.loads(capsys.readouterr().out)


def test_scores_depend_on_neither_side_nor_order(here):
    """The scores of a text are its own: whatever is chosen, and whatever else is in the batch."""
    model, _ = load_reward_model("one")
    tokenizer = load_tokenizer("one")
    pairs = [
        PreferencePair(
            prompt_ids=tuple(tokenizer(f"Q{i}").input_ids),
            chosen_ids=tuple(tokenizer(" yes" * (i + 1)).input_ids),
            rejected_ids=tuple(tokenizer(" perhaps").input_ids),
        )
        for i in range(6)
    ]
    scores = score_pairs(model, pairs, token_budget=10_000)
    swapped = [replace(pair, chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids) for pair in pairs]
    assert torch.allclose(score_pairs(model, swapped, token_budget=10_000).flip(0), scores, atol=1e-5)
    assert torch.allclose(score_pairs(model, pairs[::-1], token_budget=40).flip(1), scores, atol=1e-5)
    assert scores.std() > 0.01


def test_where_it_is_right_by_hand():
    one = judged([1.0, -1.0, 2.0, 0.0, 3.0], longer=[4, 4, -2, -2, 0])
    found = measured(replace(one, values=["x", "y", "x", "y", "x"]), seed=0)
    assert [(each.name, each.pairs, each.accuracy) for each in found.by_side] == [
        ("shorter", 2, 0.75),
        ("longer", 2, 0.5),
    ]
    assert [(each.name, each.pairs) for each in found.by_length] == [
        ("shorter by less than 4", 2),
        ("as long", 1),
        ("longer by 4 or more", 2),
    ]
    assert [(each.name, each.pairs, each.accuracy) for each in found.by_value] == [("x", 3, 1.0), ("y", 2, 0.25)]
    assert sum(each.pairs * each.accuracy for each in found.by_length) == 3.5 == 5 * found.evaluation.accuracy
    assert found.length_correlation_in_pairs.value == pytest.approx((4 - 4 - 4 + 0) / (15 * 40) ** 0.5)


def test_models_are_compared_on_the_rows_that_both_read():
    own = judged([1.0, 1.0, 1.0, -1.0], rows=[0, 1, 2, 3])
    other = judged([-1.0, 1.0, -1.0], name="other", rows=[1, 2, 4])
    (beside,) = comparisons([other, own], seed=0)
    assert (beside.a, beside.b, beside.pairs) == ("judge", "other", 2)  # rows 1 and 2
    assert beside.difference.value == pytest.approx(0.5)
    assert comparisons([own], seed=0) == []
    flipped = turned(mean_interval([1.0, 2.0, 4.0]))
    assert (flipped.low, flipped.high) == pytest.approx((-6.1279, 1.4612), abs=1e-3)


def test_the_interval_of_several_differences_is_wider():
    draws = torch.randn(3, 60, generator=torch.Generator().manual_seed(0)).tolist()
    models = [judged(row, name=str(i)) for i, row in enumerate(draws)]
    three, two = comparisons(models, seed=0)[0], comparisons(models[:2], seed=0)[0]
    assert three.difference.half_width > two.difference.half_width


def test_a_value_that_is_missing_has_a_name():
    assert column([row_of(1, kind="a"), row_of(2), row_of(3, kind=None), row_of(4, kind=5)], "kind") == [
        "a",
        "(none)",
        "(none)",
        5,
    ]


def test_the_command_by_a_column(here, capsys):
    one = found(capsys, "eval --reward-model one --pairs pairs.jsonl --by kind")
    assert one["by"]["column"] == "kind"
    assert [(each["value"], each["pairs"]) for each in one["by"]["values"]] == [("a", 6), ("b", 6)]
    assert sum(each["accuracy"] for each in one["by"]["values"]) / 2 == pytest.approx(one["accuracy"])
    plain = found(capsys, "eval --reward-model one --pairs pairs.jsonl")
    assert plain == {name: value for name, value in one.items() if name != "by"}
    assert {"accuracy_low", "calibration_error", "bins", "prefers_longer", "by_length", "by_side"} <= plain.keys()


def test_several_reward_models(here, capsys):
    both = found(capsys, "eval --reward-model one --reward-model two --pairs pairs.jsonl")
    alone = [found(capsys, f"eval --reward-model {name} --pairs pairs.jsonl") for name in ("one", "two")]
    assert both["reward_models"] == alone
    (beside,) = both["comparisons"]
    gain = abs(alone[0]["accuracy"] - alone[1]["accuracy"])
    assert beside["difference"]["value"] == pytest.approx(gain)
    assert beside["pairs"] == 12
    assert both["comparison_level"] == pytest.approx(0.95)


def test_tables(here, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert tether("eval --reward-model one --pairs pairs.jsonl --by kind") == 0
    text = capsys.readouterr().out
    for words in ("accuracy", "prefers the longer side", "chosen side, in tokens", "mean confidence", "kind"):
        assert words in text
    assert tether("eval --reward-model one --reward-model two --pairs pairs.jsonl") == 0
    text = capsys.readouterr().out
    assert "right more often" in text
    assert "chosen side, in tokens" not in text
    assert tether("eval --reward-model one --pairs pairs.jsonl --json") == 0
    assert json.loads(capsys.readouterr().out)["pairs"] == 12


def test_equal_lengths_have_no_correlation_to_show():
    found = measured(judged([1.0, -1.0, 2.0]), seed=0)
    assert in_full([found], [], by=None)
    assert found.by_side == []


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--reward-model one --by nope", ("--by", "'nope'", "prompt, chosen, rejected, kind")),
        ("--reward-model one --reward-model one", ("give each model once", "one is given twice")),
        ("--reward-model one --reward-model two --format best-of-n", ("one --reward-model",)),
        ("--reward-model one --format best-of-n --by kind", ("by is for rows of two sides",)),
    ],
)
def test_what_cannot_work_is_said_in_one_line(line, says, here, capsys):
    assert tether(f"eval --pairs pairs.jsonl {line}") == 2
    (said,) = capsys.readouterr().err.splitlines()
    for words in says:
        assert words in said


def test_a_column_is_for_pairs(tiny, here, capsys):
    assert tether(f"eval --model {tiny} --prompts pairs.jsonl --reward length:3 --by kind") == 2
    assert "by is for rows of two sides" in capsys.readouterr().err
