"""The experts that tokens got: one number per token, in sampling and in training, and how many differ."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from commandline import assert_resumes, read_rows, tether, workspace
from helpers import FunctionScorer, group, scored
from tether.algorithms import grpo, ppo
from tether.algorithms.optimise import Optim
from tether.algorithms.policy_update import routes_gap
from tether.algorithms.rollouts import batch_of
from tether.figures import reduce
from tether.generation.engine import Engine
from tether.models.checkpointing import checkpoint_activations
from tether.models.experts import routers
from tether.models.loading import load_policy
from tether.models.policy import completion_states
from tether.models.reference import reference_of
from tether.models.routes import Routes, numbers
from tether.models.unpacked import is_unpacked
from tether.runtime.directory import RunDirectory
from tether.runtime.journal import Journal, JournaledGenerator
from tether.types import Batch, Prompt, Sampling, make_requests
from tether.world import ALONE
from tiny import _ATTENTION, _GROUPED, make_model_of

KINDS = {
    "qwen3_moe": _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mixtral": _GROUPED | {"num_local_experts": 4},
    "gpt_oss": _ATTENTION
    | {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6},
}
PROMPTS = [Prompt(ids=(5, 6, 7) * 4, text="a"), Prompt(ids=(9,), text="b"), Prompt(ids=(70, 71), text="c")]
SAMPLING = Sampling(max_new_tokens=9)


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """Directories of toy models, by model type."""
    return {
        kind: make_model_of(tmp_path_factory.mktemp(kind), CONFIG_MAPPING[kind](**values))
        for kind, values in KINDS.items()
    }


def naive_routes(model, completion, prompt) -> list[int]:
    """The route of each token, from a pass over what lies before it, with nothing recorded but each router's choice."""
    found = []
    for t in range(len(completion.ids)):
        chosen: list[list[int]] = []

        def keep(_router, _inputs, output, chosen=chosen):
            chosen.append(output[2][-1].tolist())

        handles = [router.register_forward_hook(keep) for router in routers(model)]
        with torch.no_grad():
            model(input_ids=torch.tensor([[*prompt.ids, *completion.ids[:t]]]))
        for handle in handles:
            handle.remove()
        experts = model.config.get_text_config().num_local_experts
        total = sum(int(numbers(layer, experts)[e]) for layer, own in enumerate(chosen) for e in own)
        found.append((total + 2**63) % 2**64 - 2**63)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_routes_are_those_of_single_passes_in_sampling_and_in_training(mixtures, kind):
    model, tokenizer = load_policy(mixtures[kind])
    assert is_unpacked(model) == (kind == "gpt_oss")
    groups = Engine(model, tokenizer).generate(make_requests(PROMPTS, group_size=3, seed=0), sampling=SAMPLING)
    rows = [(g.prompt, c) for g in groups for c in g.completions]
    expected = [naive_routes(model, completion, prompt) for prompt, completion in rows]
    assert [list(completion.routes) for _, completion in rows] == expected
    assert len({route for own in expected for route in own}) > 3
    recorded = Routes(model)
    with recorded.recording(), torch.no_grad():
        completion_states(model.base_model, Batch.collate([(p.ids, c.ids) for p, c in rows]))
    assert recorded.picked.tolist() == [route for own in expected for route in own]


def test_a_dense_model_has_no_routes(tiny):
    model, tokenizer = load_policy(tiny)
    (only,) = Engine(model, tokenizer).generate(make_requests(PROMPTS[:1], group_size=2, seed=0), sampling=SAMPLING)
    assert [completion.routes for completion in only.completions] == [None, None]
    recorded = Routes(model)
    with recorded.recording():
        completion_states(model.base_model, Batch.collate([((5, 6), (7,))]))
    assert recorded.picked is None
    assert recorded.take() is None


def test_routes_by_hand():
    """Two layers of three experts: the sum of their numbers, modulo 2^64."""
    recorded = Routes.__new__(Routes)
    first, second = numbers(0, 3), numbers(1, 3)
    recorded.by_layer = {0: first[torch.tensor([[0, 2], [1, 0]])].sum(1), 1: second[torch.tensor([[2], [1]])].sum(1)}
    expected = [int(first[0]) + int(first[2]) + int(second[2]), int(first[1]) + int(first[0]) + int(second[1])]
    assert [x % 2**64 for x in recorded.take().tolist()] == [x % 2**64 for x in expected]
    assert recorded.take() is None
    assert not torch.equal(first, second)


def test_the_gap_by_hand():
    routes = torch.tensor([[1, 2, 3], [4, 5, 9]])
    sampled = torch.tensor([[1, 7, 3], [4, 5, 6]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert reduce(routes_gap(routes, sampled, mask), ALONE) == {"sampling/expert_gap": pytest.approx(0.2)}
    assert routes_gap(None, sampled, mask) == routes_gap(routes, None, mask) == {}


def stepped(directory, *, algorithm, change=None, **options):
    """Metrics of one step; ``change`` is made to the policy between sampling and training."""
    model, tokenizer = load_policy(directory)
    checkpoint_activations(model)
    config = algorithm.Config(
        group_size=4, sampling=SAMPLING, optim=Optim(learning_rate=1e-3), micro_batch_tokens=30, **options
    )
    state = algorithm.State.create(
        model, config, reference=reference_of(model), prompts=len(PROMPTS), total_steps=1, seed=0
    )
    sampled = []

    def score(_, completion):
        if change and not sampled:
            change(model)
        sampled.append(completion)
        return float(sum(completion.ids) % 7)

    return algorithm.step(
        state, PROMPTS, generator=Engine(model, tokenizer), scorer=FunctionScorer(score), config=config
    )


@pytest.mark.parametrize("algorithm", [grpo, ppo])
@pytest.mark.parametrize("kind", KINDS)
def test_in_float32_all_tokens_get_the_same_experts(mixtures, kind, algorithm):
    result = stepped(mixtures[kind], algorithm=algorithm)
    assert result.metrics["sampling/expert_gap"] == 0.0


def test_a_critic_with_a_trunk_of_its_own_is_not_counted(mixtures):
    result = stepped(mixtures["mixtral"], algorithm=ppo, critic_trunk=True)
    assert result.metrics["sampling/expert_gap"] == 0.0


def test_the_share_of_tokens_with_other_experts_is_counted(mixtures):
    """Experts 0 and 1 of one layer swap their places in the router after sampling: the tokens that got one of them get
    another set."""

    def swap(model):
        with torch.no_grad():
            weight = routers(model)[1].weight
            weight[[0, 1]] = weight[[1, 0]]

    result = stepped(mixtures["qwen3_moe"], algorithm=grpo, change=swap)
    base, _ = load_policy(mixtures["qwen3_moe"])
    before, after = [], []
    for g in result.groups:
        for completion in g.rollouts.completions:
            before += naive_routes(base, completion, g.rollouts.prompt)
    swap(base)
    for g in result.groups:
        for completion in g.rollouts.completions:
            after += naive_routes(base, completion, g.rollouts.prompt)
    expected = sum(a != b for a, b in zip(before, after, strict=True)) / len(before)
    assert 0.2 < expected < 1
    assert result.metrics["sampling/expert_gap"] == pytest.approx(expected)


def test_a_batch_has_the_routes_of_its_completions_only_where_all_have_some():
    rollouts = group([5, 6], [[7, 8, 9], [10]])
    assert batch_of([scored(rollouts, [0.0, 1.0])], torch.device("cpu")).routes is None
    routed = [replace(c, routes=tuple(range(i + 1, i + 1 + len(c.ids)))) for i, c in enumerate(rollouts.completions)]
    batch = batch_of([scored(replace(rollouts, completions=tuple(routed)), [0.0, 1.0])], torch.device("cpu"))
    assert batch.routes.tolist() == [[1, 2, 3], [2, 0, 0]]
    assert batch.rows(torch.tensor([1])).routes.tolist() == [[2]]
    half = replace(rollouts, completions=(routed[0], rollouts.completions[1]))
    assert batch_of([scored(half, [0.0, 1.0])], torch.device("cpu")).routes is None
    with pytest.raises(ValueError, match="routes of a completion"):
        replace(routed[0], routes=(1,))


def test_the_journal_keeps_routes(mixtures, tmp_path):
    model, tokenizer = load_policy(mixtures["mixtral"])
    directory = RunDirectory(tmp_path / "run", {})
    directory.make()
    requests = make_requests(PROMPTS, group_size=2, seed=0)
    found = []
    for _ in range(2):
        journal = Journal(directory)
        journal.begin(1)
        found.append(JournaledGenerator(Engine(model, tokenizer), journal).generate(requests, sampling=SAMPLING))
    assert found[0] == found[1]
    assert all(c.routes is not None for g in found[1] for c in g.completions)


def test_a_run_in_bfloat16_logs_the_gap_and_resumes(mixtures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    line = (
        f"grpo --model {mixtures['qwen3_moe']} --prompts p.jsonl --reward r.py:fn --steps 3 --prompts-per-step 2 "
        "--group-size 4 --max-new-tokens 12 --minibatches 2 --learning-rate 1e-2 --dtype bfloat16 --quiet"
    )
    assert_resumes(line, before=4)
    gaps = [row["sampling/expert_gap"] for row in read_rows(tmp_path / "whole" / "metrics.jsonl")]
    assert len(gaps) == 3
    assert all(0 <= gap <= 1 for gap in gaps)
    assert tether("report whole --out page.html") == 0
    assert "Tokens with other experts" in (tmp_path / "page.html").read_text(encoding="utf-8")
