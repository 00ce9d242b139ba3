"""The loss that balances experts: by hand, as the library has it, and the same however the rows are split."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig

from commandline import tether, workspace
from runs import LINES
from tether.algorithms.optimise import Guard, accumulate
from tether.data.batching import micro_batches
from tether.models.balance import Added, Balance
from tether.models.checkpointing import checkpoint_activations
from tether.models.experts import routers
from tether.models.policy import completion_logprobs
from tether.models.unpacked import set_unpacked
from tether.ops.reduce import length_mask
from tether.types import Batch
from tiny import _GROUPED, byte_tokenizer

ROWS = [((5, 6, 7) * 5, (8, 9, 10, 11)), ((5, 6, 7) * 5, (12, 9)), ((40,), (41, 42)), ((5, 6, 7) * 5, (99, 3, 4))]


@pytest.fixture
def mixture():
    torch.manual_seed(0)
    config = MixtralConfig(
        **_GROUPED, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.5
    )
    return AutoModelForCausalLM.from_config(config).eval()


def gradients(model, budget=1000) -> dict[str, torch.Tensor]:
    """Of the balancing loss alone."""
    batch = Batch.collate(ROWS)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    accumulate(
        Guard(token_budget=budget),
        optimizer,
        partial(micro_batches, batch),
        lambda part: 0.0 * completion_logprobs(model, batch.rows(part), temperature=1.0)[0].sum(),
        balance=Balance.of(model),
    )
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_by_hand():
    """Two experts, one layer, two tokens that stand for 3 rows and for 1: f = (3/4, 1/4)."""
    model = torch.nn.Linear(1, 1)
    balance = Balance.__new__(Balance)
    balance.coef, balance.weights = 0.5, torch.tensor([3, 1])
    balance.counts = balance.total = torch.zeros((), dtype=torch.float64)
    probs = torch.tensor([[0.5, 0.5], [0.2, 0.8]])
    scores = probs.log().requires_grad_()
    output = (scores, torch.ones(2, 1), torch.tensor([[0], [1]]))
    balance._count(model, (), output)
    assert balance.counts.tolist() == [3.0, 1.0]
    assert balance.total == 4.0
    weights = balance._add(model, (), output)[1]
    assert torch.equal(weights, output[1])
    (0.0 * weights.sum()).backward()
    # d loss / d score_e = coef * E * w / W * p_e (f_e - sum p f)
    expected = [[0.75 * 0.5 * 0.25, -0.75 * 0.5 * 0.25], [0.25 * 0.2 * 0.4, -0.25 * 0.8 * 0.1]]
    torch.testing.assert_close(scores.grad, torch.tensor(expected))


def test_what_is_added_has_the_gradient_one():
    x, loss = torch.tensor([2.0, 3.0], requires_grad=True), torch.tensor(7.0, requires_grad=True)
    (Added.apply(x, loss) * torch.tensor([5.0, 6.0])).sum().backward()
    assert x.grad.tolist() == [5.0, 6.0]
    assert loss.grad == 1.0


def test_it_is_the_librarys(mixture):
    found = gradients(mixture)
    mixture.zero_grad()
    batch = Batch.collate(ROWS)
    run = length_mask(batch.lengths - 1, batch.ids.size(1)).long()
    out = mixture(input_ids=batch.ids, attention_mask=run, output_router_logits=True)
    (0.5 * out.aux_loss).backward()
    expected = {name: weight.grad for name, weight in mixture.named_parameters() if weight.grad is not None}
    assert max(float(expected[name].abs().max()) for name in expected if "gate" in name) > 1e-3
    for name, value in found.items():
        torch.testing.assert_close(value, expected.get(name, torch.zeros_like(value)), rtol=1e-3, atol=1e-6, msg=name)


def test_the_gradient_does_not_depend_on_how_rows_are_split_padded_or_recomputed(mixture):
    whole = gradients(mixture)
    assert_close(gradients(mixture, budget=1), whole)
    set_unpacked(mixture, True)
    assert_close(gradients(mixture), whole)
    set_unpacked(mixture, False)
    checkpoint_activations(mixture)
    assert_close(gradients(mixture), whole)
    left = [hook for router in routers(mixture) for hook in router._forward_hooks.values()]
    assert not any(isinstance(getattr(hook, "__self__", None), Balance) for hook in left)


def test_only_where_the_configuration_asks(mixture, tiny):
    mixture.config.output_router_logits = False
    assert Balance.of(mixture) is None
    mixture.config.output_router_logits, mixture.config.router_aux_loss_coef = True, 0.0
    assert Balance.of(mixture) is None
    dense = AutoModelForCausalLM.from_pretrained(tiny)
    dense.config.output_router_logits, dense.config.router_aux_loss_coef = True, 0.5
    assert Balance.of(dense) is None


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "ppo", "grpo"])
def test_every_update_adds_it(name, mixture, tmp_path, monkeypatch):
    """With and without, from the same weights: the routers end elsewhere, and a repeated run ends at the same."""
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    for asked in (True, False):
        mixture.config.output_router_logits = asked
        mixture.save_pretrained(tmp_path / str(asked))
        byte_tokenizer().save_pretrained(tmp_path / str(asked))
    for out, asked in (("with", True), ("again", True), ("without", False)):
        assert tether(f"{LINES[name]} --quiet --model {tmp_path / str(asked)} --out {out}") == 0
    with_it, again, without = (
        load_file(tmp_path / out / "model" / "model.safetensors") for out in ("with", "again", "without")
    )
    gates = [key for key in with_it if "gate.weight" in key]
    assert len(gates) == 2
    for key in with_it:
        assert torch.equal(with_it[key], again[key])
    assert not any(torch.equal(with_it[key], without[key]) for key in gates)
