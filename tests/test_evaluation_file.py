"""The file of held-out completions, and the KL of each of them."""

from __future__ import annotations

import pyarrow.parquet
import pytest
import torch

from evaluated import groups_of
from helpers import random_groups
from tether.evaluation import completion_kl, evaluate_policy, policy_kl, write_evaluation
from tether.models.loading import load_policy
from tether.models.reference import FrozenCopy
from tiny import make_model


def test_the_kl_of_each_completion_is_the_sum_of_k3_over_its_tokens(tiny, tmp_path):
    policy, _ = load_policy(tiny)
    other, _ = load_policy(make_model(tmp_path, seed=5))
    groups = random_groups(3, 2)
    found = completion_kl(groups, policy=policy, reference=FrozenCopy(other), temperature=0.7)
    naive = []
    for group in groups:
        for completion in group.rollouts.completions:
            ids = torch.tensor([[*group.rollouts.prompt.ids, *completion.ids]])
            begin, total = len(group.rollouts.prompt.ids) - 1, 0.0
            with torch.no_grad():
                logits = [model(ids).logits[0, begin:-1] / 0.7 for model in (policy, other)]
            p, q = (torch.log_softmax(one, -1) for one in logits)
            for t, token in enumerate(completion.ids):
                d = float(p[t, token] - q[t, token])
                total += float(torch.exp(torch.tensor(-d))) - 1 + d
            naive.append(total)
    assert found.shape == (6,)
    assert found.tolist() == pytest.approx(naive, rel=1e-3)
    mean = policy_kl(groups, policy=policy, reference=FrozenCopy(other), temperature=0.7)
    assert mean == pytest.approx(sum(naive) / 6, rel=1e-3)


def test_the_rows_of_an_evaluation(tmp_path):
    policy = groups_of({"x": [1.0, None], "y": [0.5, 0.25]}, judge={"x": [3.0, 4.0], "y": [5.0, 6.0]})
    reference = groups_of({"x": [0.0, 0.0], "y": [0.0, 0.0]})
    write_evaluation(tmp_path, policy, reference, torch.tensor([0.5, 1.0, 1.5, 2.0]), seed=7)
    rows = pyarrow.parquet.read_table(tmp_path / "evaluation.parquet").to_pylist()
    assert [(row["model"], row["prompt_index"], row["completion_index"]) for row in rows] == [
        (model, i, j) for model in ("policy", "reference") for i in range(2) for j in range(2)
    ]
    assert rows[1] == {
        "model": "policy", "prompt_index": 0, "completion_index": 1, "seed": 7, "prompt": "x", "completion": "",
        "score": None, "rewards/fn": None, "rewards/judge": 4.0, "kl": 1.0, "length": 2, "finish_reason": "eos",
    }  # fmt: skip
    assert [row["kl"] for row in rows] == [0.5, 1.0, 1.5, 2.0, 0.0, 0.0, 0.0, 0.0]
    assert rows[4]["rewards/judge"] is None
    with pytest.raises(ValueError, match="zip"):
        write_evaluation(tmp_path, policy, reference, [0.5], seed=7)


def test_the_types_of_an_evaluation_do_not_depend_on_its_values(tmp_path):
    def schema(score):
        write_evaluation(tmp_path, groups_of({"x": [score]}), groups_of({"x": [score]}), [0], seed=7)
        return pyarrow.parquet.read_schema(tmp_path / "evaluation.parquet")

    assert schema(None) == schema(1.0)


def test_the_interval_of_an_evaluation_is_students():
    """Two prompts with means 1 and 2: half a width of 12.706 * sqrt(1 / 2) / sqrt(2)."""
    groups = groups_of({"x": [1.0, 1.0], "y": [2.0, 2.0]})
    assert evaluate_policy(groups, groups, kl=0.0).reward_ci95 == pytest.approx(12.7062 / 2, rel=1e-5)
