"""Mixtures of experts: routers in float32, and decoding without graphs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tether.generation.engine import Engine
from tether.generation.graphs import graphed
from tether.generation.naive import NaiveGenerator
from tether.models.adapters import Lora, add_adapter
from tether.models.experts import routers
from tether.models.linear import has_rounded_matmuls, round_matmuls
from tether.models.loading import load_policy
from tether.models.policy import completion_logprobs, completion_states, padded_states
from tether.models.reward import new_reward_model
from tether.models.saving import save_model
from tether.types import Batch, Prompt, Sampling, make_requests
from tiny import _GROUPED, make_model_of

KINDS = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 3.0},
}
ROWS = [((5, 6, 7) * 9, (8, 9, 10, 11)), ((5, 6, 7) * 9, (12, 9)), ((40,), (41, 42))]


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """Directories of toy models, by model type."""
    return {
        kind: make_model_of(tmp_path_factory.mktemp(kind), CONFIG_MAPPING[kind](**_GROUPED | changes))
        for kind, changes in KINDS.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_mixtures_pack_and_are_sampled_exactly(mixtures, kind):
    model, tokenizer = load_policy(mixtures[kind])
    new_reward_model(mixtures[kind], seed=0)
    assert len(routers(model)) == 2
    with torch.no_grad():
        torch.testing.assert_close(
            completion_states(model.base_model, Batch.collate(ROWS)),
            padded_states(model.base_model, Batch.collate(ROWS)),
            rtol=1e-4,
            atol=1e-4,
        )
    requests = make_requests([Prompt(ids=(5, 6, 7), text=""), Prompt(ids=(9,), text="")], group_size=3, seed=0)
    found, expected = (
        [c.ids for group in kind(model, tokenizer).generate(requests, sampling=Sampling(max_new_tokens=6))
         for c in group.completions]
        for kind in (Engine, NaiveGenerator)
    )  # fmt: skip
    assert found == expected


def test_routers_compute_in_float32_in_a_model_of_bfloat16(mixtures, tmp_path):
    model, tokenizer = load_policy(mixtures["qwen3_moe"], dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    for whole in (model, copy.deepcopy(model)):
        for router in routers(whole):
            x = torch.randn(5, 32).bfloat16()
            scores, weights, chosen = router(x)
            expected = functional.linear(x.float(), router.weight.float())
            assert scores.dtype == weights.dtype == torch.float32
            torch.testing.assert_close(scores, expected)
            assert torch.equal(chosen, expected.topk(2).indices)
            assert router.weight.dtype == torch.bfloat16
            assert router.weight is dict(router.named_parameters())["weight"]
    (logp,) = completion_logprobs(model, Batch.collate(ROWS), temperature=1.0)
    logp.sum().backward()
    assert all(float(router.weight.grad.norm()) > 0 for router in routers(model))
    save_model(model, tokenizer, tmp_path / "saved")
    loaded, _ = load_policy(str(tmp_path / "saved"), dtype=torch.bfloat16)
    assert torch.equal(completion_logprobs(loaded, Batch.collate(ROWS), temperature=1.0)[0], logp)


def test_a_router_that_fails_has_its_weights_again(mixtures):
    model, _ = load_policy(mixtures["mixtral"], dtype=torch.bfloat16)
    router = routers(model)[0]
    with pytest.raises(RuntimeError):
        router(torch.ones(3, 7).bfloat16())
    assert router.weight is dict(router.named_parameters())["weight"]


def test_a_dense_model_has_no_router(tiny):
    model, _ = load_policy(tiny, dtype=torch.bfloat16)
    assert not routers(model)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert graphed(model, torch.device("cuda"))
    assert not graphed(model, torch.device("cpu"))


def test_decoding_steps_of_mixtures_are_not_captured(mixtures):
    """Their products have shapes that depend on the tokens."""
    model, _ = load_policy(mixtures["mixtral"])
    assert not graphed(model, torch.device("cuda"))


def test_routers_are_not_rounded_in_products_of_bfloat16():
    kind = CONFIG_MAPPING["hunyuan_v1_moe"]
    model = AutoModelForCausalLM.from_config(kind(**_GROUPED, num_experts=4, moe_topk=2))
    before = [router(torch.ones(3, 32))[0] for router in routers(model)]
    round_matmuls(model)
    assert has_rounded_matmuls(model)
    after = [router(torch.ones(3, 32))[0] for router in routers(model)]
    assert len(after) == 2
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)


def test_an_adapter_on_a_mixture_packs(mixtures):
    model, _ = load_policy(mixtures["mixtral"])
    add_adapter(model, Lora(lora_rank=2), seed=0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    with torch.no_grad():
        torch.testing.assert_close(
            completion_states(model.base_model, Batch.collate(ROWS)),
            padded_states(model.base_model, Batch.collate(ROWS)),
            rtol=1e-4,
            atol=1e-4,
        )
