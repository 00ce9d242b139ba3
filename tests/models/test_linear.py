"""Matrix products in bfloat16 on float32 weights: what they compute, every change of a weight, and what stays."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from commandline import read_rows, tether, workspace
from helpers import gradient, relative_error
from tether.algorithms.optimise import Optim, adamw
from tether.models.checkpointing import checkpoint_activations
from tether.models.linear import RoundedConv1D, RoundedLinear, has_rounded_matmuls, round_matmuls
from tether.models.loading import load_policy
from tether.models.policy import Critic, completion_logprobs, replace_weights
from tether.models.reference import reference_of
from tether.models.reward import new_reward_model
from tether.models.saving import save_model
from tether.models.trainable import trainable
from tether.runtime import device
from tether.types import Batch
from tiny import ARCHITECTURES

ROWS = [((0, 10, 11), (12, 13, 1)), ((0, 20), (21, 22, 23, 24, 25, 26, 27, 28, 1)), ((0,), (40,))]


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.detach().bfloat16().float()


def layers():
    linear, conv = nn.Linear(40, 24), Conv1D(24, 40)
    nn.init.normal_(conv.bias)
    return {"linear": linear, "no bias": nn.Linear(40, 24, bias=False), "conv1d": conv}


@pytest.mark.parametrize("name", layers())
def test_products_of_rounded_operands(name):
    """Forward, dx and dW are the float32 products of operands rounded first, but for the rounding of each sum."""
    layer = layers()[name]
    weight = layer.weight if name != "conv1d" else layer.weight.T
    holder = nn.Sequential(layer)
    round_matmuls(holder)
    x = torch.randn(5, 7, 40, requires_grad=True)
    slope = torch.randn(5, 7, 24)
    y = holder(x)
    (y * slope).sum().backward()
    bias = 0 if layer.bias is None else layer.bias.detach()
    near = {"rtol": 2**-8, "atol": 1e-4}
    assert y.dtype == x.grad.dtype == layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.detach() - bias, rounded(x) @ rounded(weight).T, **near)
    torch.testing.assert_close(x.grad, rounded(slope) @ rounded(weight), **near)
    dw = rounded(slope).flatten(0, 1).T @ rounded(x).flatten(0, 1)
    torch.testing.assert_close(layer.weight.grad if name != "conv1d" else layer.weight.grad.T, dw, **near)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, slope.sum((0, 1)))
    with torch.no_grad():
        assert torch.equal(holder(x), y)


def test_no_rows_and_weights_that_do_not_learn():
    layer = nn.Sequential(nn.Linear(4, 3))
    layer.requires_grad_(False)
    round_matmuls(layer)
    assert layer(torch.zeros(0, 4)).shape == (0, 3)
    x = torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, rounded(layer[0].weight).sum(0).expand(2, 4), rtol=2**-8, atol=1e-4)
    assert layer[0].weight.grad is None


class LowRank(nn.Module):
    """An adapter around a frozen layer, built as peft builds its own: base(x) + B A x."""

    def __init__(self, base):
        super().__init__()
        out, width = base(torch.zeros(1, 40)).size(-1), 40
        self.base_layer = base.requires_grad_(False)
        self.lora_a, self.lora_b = nn.Linear(width, 3, bias=False), nn.Linear(3, out, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_b(self.lora_a(x))


@pytest.mark.parametrize("name", layers())
def test_a_layer_can_carry_an_adapter(name):
    """The base stays what it was, frozen, and rounded; the adapter is rounded too and gets all the gradient."""
    adapted = LowRank(layers()[name])
    x = torch.randn(5, 40)
    exact = adapted(x).detach()
    round_matmuls(adapted)
    assert isinstance(adapted.base_layer, RoundedLinear | RoundedConv1D)
    assert trainable(adapted).keys() == {"lora_a.weight", "lora_b.weight"}
    found = adapted(x)
    torch.testing.assert_close(found.detach(), exact, rtol=2**-6, atol=0.05)
    found.sum().backward()
    assert adapted.base_layer.weight.grad is None
    lower = rounded(rounded(x) @ rounded(adapted.lora_a.weight).T)
    torch.testing.assert_close(adapted.lora_b.weight.grad, lower.sum(0).expand(24, 3), rtol=2**-6, atol=0.05)


def logp_gradient(model):
    model.zero_grad()
    (logp,) = completion_logprobs(model, Batch.collate(ROWS), temperature=1.0)
    (-logp.sum() / 13).backward()
    return logp.detach(), gradient(model)


@pytest.fixture(params=ARCHITECTURES)
def pair(request, tiny_models):
    """A model, and the same with rounded products."""
    exact, half = (load_policy(tiny_models[request.param])[0] for _ in range(2))
    with torch.no_grad():  # the fixture's are drawn wide: steep attention turns roundings into other answers
        for p in (*exact.parameters(), *half.parameters()):
            p.mul_(0.3 if p.ndim > 1 else 1.0)
    round_matmuls(half)
    return exact, half


def test_every_architecture_computes_nearly_the_same(pair):
    exact, half = pair
    linear = [m for m in half.modules() if isinstance(m, nn.Linear | Conv1D)]
    assert linear
    assert all(isinstance(m, RoundedLinear | RoundedConv1D) for m in linear)
    assert isinstance(half.get_output_embeddings(), RoundedLinear)
    assert half.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in half.parameters())
    (logp, g), (logp_half, g_half) = logp_gradient(exact), logp_gradient(half)
    assert 0 < relative_error(logp_half, logp) < 0.01
    assert 1e-4 < relative_error(g_half, g) < 0.02


def test_files_are_the_same(pair, tokenizer, tmp_path):
    exact, half = pair
    logp_gradient(half)
    assert half.state_dict().keys() == exact.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(half.state_dict().values(), exact.state_dict().values(), strict=True))
    assert [name for name, _ in half.named_buffers()] == [name for name, _ in exact.named_buffers()]
    for name, model in (("exact", exact), ("half", half)):
        save_model(model, tokenizer, tmp_path / name)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("exact", "half"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (tmp_path / "exact/config.json").read_text() == (tmp_path / "half/config.json").read_text()
    assert not has_rounded_matmuls(AutoModelForCausalLM.from_pretrained(tmp_path / "half"))


def fused_adamw(layer, other):
    optimizer = adamw([(layer.parameters(), 0.1)], Optim())
    layer.weight.grad = other.weight.detach().clone()
    optimizer.step()


def fused_sgd(layer, other):
    layer.weight.grad = other.weight.detach().clone()
    torch.optim.SGD(layer.parameters(), lr=0.1, fused=True).step()


def plain_sgd(layer, other):
    layer.weight.grad = other.weight.detach().clone()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


@torch.no_grad()
def copy_in_place(layer, other):
    layer.weight.copy_(other.weight)


def load_state(layer, other):
    layer.load_state_dict(other.state_dict())


def another_parameter(layer, other):
    layer.weight = nn.Parameter(other.weight.detach().clone())


def a_larger_parameter(layer, other):
    layer.weight = nn.Parameter(torch.cat([other.weight, other.weight]).detach())


def other_memory(layer, other):
    layer.weight.data = other.weight.detach().clone()


def weights_of_another_process(layer, other):
    replace_weights(layer, other.named_parameters())


@pytest.mark.parametrize(
    "change",
    [
        fused_adamw,
        fused_sgd,
        plain_sgd,
        copy_in_place,
        load_state,
        another_parameter,
        a_larger_parameter,
        other_memory,
        weights_of_another_process,
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_a_changed_weight_is_rounded_again(change, grad):
    layer, other = nn.Sequential(nn.Linear(8, 8, bias=False)), nn.Linear(8, 8, bias=False)
    round_matmuls(layer)
    x = torch.eye(8)
    with torch.set_grad_enabled(grad):
        before = layer(x)
    for _ in range(3):
        change(layer[0], other)
        with torch.set_grad_enabled(grad):
            after = layer(x)
        assert torch.equal(after.detach(), rounded(layer[0].weight).T)
        nn.init.normal_(other.weight)
    assert before.shape != after.shape or not torch.equal(before, after)


def test_an_unchanged_weight_is_rounded_once(monkeypatch):
    layer = nn.Sequential(nn.Linear(8, 8))
    round_matmuls(layer)
    kept = layer[0].rounded.copy
    version = kept._version
    with torch.no_grad():
        for _ in range(3):
            layer(torch.eye(8))
        assert kept._version == version
        layer[0].weight.mul_(2)
        layer(torch.eye(8))
    assert layer[0].rounded.copy is kept  # refreshed in place
    assert kept._version == version + 1
    assert torch.equal(kept, layer[0].weight.bfloat16())


@pytest.mark.parametrize("used_before", [True, False])
def test_a_deep_copy_goes_its_own_way(used_before):
    """The copy of a weight that has changed since it was last used is not taken for the one that was rounded."""
    layer = nn.Sequential(nn.Linear(8, 8, bias=False))
    round_matmuls(layer)
    x = torch.eye(8)
    with torch.no_grad():
        if used_before:
            layer(x)
        layer[0].weight.add_(1)
        twin = copy.deepcopy(layer)
        assert has_rounded_matmuls(twin)
        assert torch.equal(twin(x), rounded(layer[0].weight).T)
        layer[0].weight.add_(1)
        assert torch.equal(twin(x), rounded(twin[0].weight).T)
        assert torch.equal(layer(x), rounded(layer[0].weight).T)
        assert not torch.equal(twin(x), layer(x))
        twin[0].weight.zero_()
        assert torch.equal(layer(x), rounded(layer[0].weight).T)


def test_reference_and_critic_are_rounded_and_heads_of_one_number_are_not(tiny):
    policy, _ = load_policy(tiny)
    round_matmuls(policy)
    with reference_of(policy).model() as reference:
        assert has_rounded_matmuls(reference)
    critic = Critic(policy, own_trunk=True)
    assert has_rounded_matmuls(critic.trunk)
    assert not isinstance(critic.head, RoundedLinear)
    judge, _ = new_reward_model(tiny, seed=0)
    round_matmuls(judge)
    assert has_rounded_matmuls(judge.base_model)
    assert not has_rounded_matmuls(judge.score)


def test_weights_of_bfloat16_are_left_alone(tiny):
    model, _ = load_policy(tiny, dtype=torch.bfloat16)
    round_matmuls(model)
    assert not has_rounded_matmuls(model)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_under_activation_checkpointing(architecture, tiny_models):
    plain, saving = (load_policy(tiny_models[architecture])[0] for _ in range(2))
    for model in (plain, saving):
        round_matmuls(model)
    checkpoint_activations(saving)
    (logp, g), (logp_saving, g_saving) = logp_gradient(plain), logp_gradient(saving)
    assert torch.equal(logp, logp_saving)
    torch.testing.assert_close(g, g_saving)


def test_auto_takes_what_is_faster(tiny, monkeypatch):
    full, half = load_policy("base")[0], load_policy(tiny, dtype=torch.bfloat16)[0]
    rates = {torch.float32: 100.0, torch.bfloat16: 150.0}
    monkeypatch.setattr(device, "matrix_rate", lambda dtype, _: rates[dtype])
    assert device.pick_matmul_dtype("auto", full) == "bfloat16"
    assert device.pick_matmul_dtype("auto", load_policy(tiny)[0]) == "float32"  # too small to gain
    rates[torch.bfloat16] = 149.0
    assert device.pick_matmul_dtype("auto", full) == "float32"
    assert device.pick_matmul_dtype("auto", half) == "bfloat16"
    assert device.pick_matmul_dtype("bfloat16", full) == "bfloat16"
    assert device.pick_matmul_dtype("float32", half) == "float32"


@pytest.mark.parametrize(
    "line",
    [
        "sft --data texts.jsonl --batch-size 4",
        "reward --pairs pairs.jsonl --batch-size 8",
        "rejection-sampling --prompts p.jsonl --reward r.py:fn --group-size 4 --top-k 2 --max-new-tokens 4",
        "ppo --prompts p.jsonl --reward r.py:fn --steps 2 --prompts-per-step 3 --max-new-tokens 4",
        "grpo --prompts p.jsonl --reward r.py:fn --group-size 3 --steps 2 --prompts-per-step 3 --max-new-tokens 4",
    ],
    ids=lambda line: line.split()[0],
)
def test_runs_take_matmul_dtype_and_record_it(line, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    monkeypatch.setattr(device, "WORTH_ROUNDING", 0.0)
    monkeypatch.setattr(device, "SMALL_MATRIX", 0)
    for products, expected in (("float32", "float32"), ("auto", "bfloat16")):
        assert tether(f"{line} --model {tiny} --quiet --out {products} --matmul-dtype {products}") == 0
        assert yaml.safe_load((tmp_path / products / "config.yaml").read_text())["matmul_dtype"] == expected
    exact, half = (load_file(tmp_path / name / "model/model.safetensors") for name in ("float32", "auto"))
    assert exact.keys() == half.keys()
    assert any(not torch.equal(exact[name], half[name]) for name in exact)
    assert all(tensor.dtype == torch.float32 for tensor in half.values())


def test_eval_and_generate_take_matmul_dtype(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    pairs = f"reward --model {tiny} --pairs pairs.jsonl --batch-size 8 --quiet --out rm"
    assert tether(f"{pairs} --matmul-dtype bfloat16") == 0
    line = f"eval --model {tiny} --prompts p.jsonl --reward rm/model --reference {tiny} --max-new-tokens 4"
    found = []
    for products in ("float32", "bfloat16"):
        capsys.readouterr()
        assert tether(f"{line} --matmul-dtype {products}") == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["kl"] == found[1]["kl"] == 0.0
    assert found[0]["reward"] != found[1]["reward"]
    line = f"generate --model {tiny} --prompts p.jsonl --max-new-tokens 4 --out g.jsonl"
    assert tether(f"{line} --matmul-dtype bfloat16") == 0
    assert len(read_rows(tmp_path / "g.jsonl")) == 5
    assert tether("eval --reward-model rm/model --pairs pairs.jsonl --matmul-dtype bfloat16") == 0
