"""Best-of-n rows and the score of ties: numbers worked by hand, and the command."""

from __future__ import annotations

import json
import math

import pytest

from commandline import tether, write_rows
from tether.errors import DataError
from tether.looking.best_of_n import Item, Scored, accuracy_of, summed_up, ties_score
from tether.models.loading import load_tokenizer
from tether.models.reward import load_reward_model, new_reward_model, save_reward_model, score_sequences


def scored(chosen, rejected, *, subset=None, id="", prompt="p"):
    item = Item(where="line 1", prompt=prompt, chosen=[], rejected=[], subset=subset, id=id)
    return Scored(item=item, chosen=chosen, rejected=rejected)


def test_a_row_counts_one_over_those_at_the_top():
    assert scored([3.0], [1.0, 2.0, 2.5]).credit == 1
    assert scored([3.0], [3.0, 2.0, 2.5]).credit == 0.5
    assert scored([3.0], [3.0, 3.0, 3.0]).credit == 0.25
    assert scored([3.0], [3.1, 2.0, 2.5]).credit == 0
    rows = [scored([3.0], [1.0], prompt="a"), scored([3.0], [3.0], prompt="b"), scored([0.0], [1.0], prompt="c")]
    assert accuracy_of(rows)["accuracy"] == pytest.approx(0.5)


def test_ties_by_hand():
    """Prompt 1: gap 2 - 1 = 1, spread 3 - 2 = 1, the other's gap 4. Prompt 2: gap 5, spread 1, the other's gap 0.5."""
    rows = [
        scored([3.0, 2.0], [1.0, 0.0], subset="Ties", id="tied:1"),
        scored([5.0], [1.0], subset="Ties", id="ref:1"),
        scored([7.0, 6.0], [1.0], subset="Ties", id="tied:2"),
        scored([1.5], [1.0], subset="Ties", id="ref:2"),
        scored([0.0], [1.0], subset="Ties", id="ref:3"),
    ]
    found = ties_score(rows)
    assert found["tied_accuracy"] == 1
    assert found["ref_accuracy"] == pytest.approx(2 / 3)
    assert found["preferred"] == 0.5  # 1 > 1 is false, 5 > 1
    assert found["preferred_hard"] == 0  # min(1, 4) > 1 and min(5, 0.5) > 1 are false
    assert found["margin"] == pytest.approx((math.tanh(1 / 1 - 1) + math.tanh(0.5 / 1 - 1)) / 2)
    single = ties_score([*rows, scored([9.0], [1.0], subset="Ties", id="tied:3")])
    level = ties_score([*rows, scored([9.0, 9.0], [1.0], subset="Ties", id="tied:3")])
    assert single["preferred"] == 0.5  # one right answer has no spread
    assert level["preferred"] == pytest.approx(2 / 3)
    assert single["margin"] == level["margin"] == found["margin"]
    expected = 0.3 + 0.3 * 2 / 3 + 0.2 * 0.5 + 0.01 * found["margin"]
    assert found["score"] == pytest.approx(expected)
    everything = summed_up([*rows, scored([2.0], [1.0], subset="Math"), scored([0.0], [1.0], subset="Math")])
    assert everything["subsets"]["Math"]["accuracy"] == 0.5
    assert everything["accuracy"] == 0.5  # the ties have a score of their own
    assert everything["mean_of_subsets"] == pytest.approx((expected + 0.5) / 2)


def test_ties_need_ids():
    with pytest.raises(DataError, match="needs an id such as ref:3 or tied:3, found '7'"):
        ties_score([scored([1.0], [0.0], subset="Ties", id="7")])


@pytest.fixture
def judge(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = new_reward_model(tiny, seed=0)
    save_reward_model(model, tokenizer, tmp_path / "rm", [((0, 5), (6, 1)), ((0, 7), (8, 1))])
    return tmp_path


def test_the_command_scores_each_answer_after_its_prompt(judge, capsys):
    rows = [
        {"prompt": f"Q{i}", "chosen": [f" yes {i}"], "rejected": [" no", " maybe", " never"], "subset": "Focus"}
        for i in range(6)
    ]
    write_rows(judge / "rows.jsonl", rows)
    assert tether("eval --reward-model rm --pairs rows.jsonl --format best-of-n") == 0
    found = json.loads(capsys.readouterr().out)
    model, tokenizer = load_reward_model("rm")[0], load_tokenizer("rm")
    right = 0
    for row in rows:
        front = len(tokenizer(row["prompt"])["input_ids"])
        ids = [tokenizer(row["prompt"] + text)["input_ids"] for text in [*row["chosen"], *row["rejected"]]]
        scores = score_sequences(model, [(one[:front], [*one[front:], tokenizer.eos_token_id]) for one in ids])
        right += int(scores.argmax()) == 0
    assert found["accuracy"] == pytest.approx(right / 6)
    assert found["subsets"]["Focus"]["scored_rows"] == found["rows"] == 6


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "Q", "chosen": ["a"]}, "column 'rejected' is missing or empty"),
        ({"prompt": "Q", "chosen": [], "rejected": ["b"]}, "column 'chosen' is missing or empty"),
        ({"prompt": "Q", "chosen": [3], "rejected": ["b"]}, "must be texts or lists of texts"),
        ({"prompt": "Q", "chosen": "a" * 400, "rejected": "b"}, "context"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(row, says, judge, capfd):
    write_rows(judge / "rows.jsonl", [row])
    assert tether("eval --reward-model rm --pairs rows.jsonl --format best-of-n") == 2
    assert says in capfd.readouterr().err


def test_the_format_is_for_reward_models(tiny, capfd):
    line = f"eval --model {tiny} --prompts p.jsonl --reward length:3 --format best-of-n"
    assert tether(line) == 2
    assert "format is for a reward model" in capfd.readouterr().err
