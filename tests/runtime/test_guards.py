"""What is not finite stops a run with exit code 3, says which and where, and leaves what came before."""

from __future__ import annotations

import pytest
import torch

from commandline import read_rows, tether, workspace
from tether.algorithms import grpo, ppo

RUN = (
    "--prompts p.jsonl --reward r.py:fn --prompts-per-step 2 --group-size 2 --max-new-tokens 4 --steps 4 "
    "--max-skipped 1 --out out"
)
DIVERGE = "--learning-rate 1e30 --lr-schedule constant --max-grad-norm 1e9"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    return tmp_path


def steps(here):
    return [row["step"] for row in read_rows(here / "out" / "metrics.jsonl")]


@pytest.fixture
def poison(monkeypatch):
    """Before step ``at``, ``spoil`` what the algorithm is about to use."""

    def before(algorithm, at, spoil):
        step = algorithm.step

        def spoiled(state, prompts, **rest):
            if state.step + 1 == at:
                spoil(state)
            return step(state, prompts, **rest)

        monkeypatch.setattr(algorithm, "step", spoiled)

    return before


def set_weight(model, value):
    with torch.no_grad():
        next(model.parameters()).fill_(value)


def spoil_policy(state):
    set_weight(state.policy, float("inf"))


def spoil_reference(state):
    with state.reference.model() as reference:
        set_weight(reference, float("nan"))


def spoil_critic(state):
    set_weight(state.critic.head, float("nan"))


def spoil_gradient(state):
    next(state.policy.parameters()).register_hook(lambda gradient: gradient * float("nan"))


CASES = {
    "logits": (spoil_policy, "logits"),
    "KL": (spoil_reference, "log-ratio to the reference"),
    "gradient": (spoil_gradient, "gradient"),
}


@pytest.mark.parametrize("name", ["ppo", "grpo"])
@pytest.mark.parametrize(("spoil", "which"), CASES.values(), ids=CASES.keys())
def test_a_poisoned_step_stops_the_run(name, spoil, which, here, tiny, poison, capfd):
    poison({"ppo": ppo, "grpo": grpo}[name], 3, spoil)
    assert tether(f"{name} {RUN}", "--model", tiny) == 3
    complaint = capfd.readouterr().err.splitlines()[-1]
    assert complaint.startswith(f"tether {name}: {name} step 3: ")
    assert which in complaint
    assert "not finite" in complaint
    assert steps(here) == [1, 2]
    assert not (here / "out" / "model").exists()
    assert not (here / "out" / "summary.json").exists()
    assert not list((here / "out").rglob(".*"))


def test_a_poisoned_critic_stops_ppo(here, tiny, poison, capfd):
    poison(ppo, 2, spoil_critic)
    assert tether(f"ppo {RUN}", "--model", tiny) == 3
    assert "ppo step 2: the loss is not finite" in capfd.readouterr().err
    assert steps(here) == [1]


@pytest.mark.parametrize(
    "line",
    [
        "sft --data texts.jsonl --batch-size 2",
        f"grpo {RUN.removesuffix(' --out out')}",
        "rejection-sampling --prompts p.jsonl --reward r.py:fn --group-size 2 --max-new-tokens 4 --rounds 3",
    ],
    ids=["sft", "grpo", "rejection-sampling"],
)
def test_a_learning_rate_that_is_far_too_large_is_stopped(line, here, tiny, capfd):
    assert tether(f"{line} {DIVERGE} --out out", "--model", tiny) == 3
    assert "not finite" in capfd.readouterr().err.splitlines()[-1]
    assert steps(here)
    assert not (here / "out" / "model").exists()


def test_a_reward_model_that_diverges_is_stopped(here, tiny, capfd):
    line = f"reward --pairs pairs.jsonl --batch-size 4 --evals-per-epoch 1 {DIVERGE} --out out"
    assert tether(line, "--model", tiny) == 3
    assert "not finite" in capfd.readouterr().err.splitlines()[-1]
    assert not (here / "out" / "model").exists()


def test_an_interrupt_is_75_and_leaves_a_run_that_can_be_read(here, tiny, capfd):
    (here / "slow.py").write_text(
        "calls = []\n"
        "def fn(completions, **_):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3:\n"
        "        raise KeyboardInterrupt\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    line = RUN.replace("r.py", "slow.py")
    assert tether(f"grpo {line} --save-every 1", "--model", tiny) == 75
    assert "interrupted" in capfd.readouterr().err.splitlines()[-1]
    assert steps(here) == [1, 2]
    assert sorted(p.name for p in (here / "out" / "checkpoints").iterdir()) == ["step_000001", "step_000002"]
    assert not list((here / "out").rglob(".*"))
    assert tether("report out") == 0
