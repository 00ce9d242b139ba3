"""Weights of 4 and 8 bits under an adapter."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from commandline import assert_resumes, tether, workspace
from runs import LINES
from tether.errors import ConfigError
from tether.models.adapters import Lora, add_adapter
from tether.models.flops import shape_of
from tether.models.loading import load_policy
from tether.models.policy import policy_logits
from tether.models.quantised import import_bitsandbytes, is_quantised, quantisation
from tether.models.reward import load_reward_model
from tether.models.trainable import trainable
from tiny import ARCHITECTURES, byte_tokenizer

pytest.importorskip("accelerate")
try:
    import_bitsandbytes()
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
except ImportError:
    pytest.skip("needs bitsandbytes", allow_module_level=True)

IDS = torch.tensor([[0, 70, 71, 9, 200, 31]])
KINDS = ("4bit", "8bit")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A tiny model whose layers have whole blocks of 64 weights per row."""
    directory = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = LlamaConfig(**vars(ARCHITECTURES["llama"]) | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16})
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return str(directory)


def logprobs(model):
    with torch.no_grad():
        return policy_logits(model, IDS).log_softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_close_to_what_they_were_and_the_heads_are_as_they_were(kind, wide):
    whole, _ = load_policy(wide)
    policy, _ = load_policy(wide, quantise=kind)
    assert is_quantised(policy)
    assert not is_quantised(whole)
    assert torch.equal(policy.lm_head.weight, whole.lm_head.weight)
    assert policy.model.layers[0].mlp.up_proj.weight.element_size() == 1
    layer, exact = (model.model.layers[0].mlp.up_proj for model in (policy, whole))
    with torch.no_grad():
        error = (layer(torch.eye(64)).T - exact.weight).norm() / exact.weight.norm()
    assert 0 < error < {"4bit": 0.12, "8bit": 0.01}[kind]
    assert shape_of(policy) == shape_of(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_others_of_its_batch(kind, wide):
    policy, _ = load_policy(wide, quantise=kind)
    other = torch.tensor([[0, 9, 9, 9, 9, 9]])
    with torch.no_grad():
        together = policy_logits(policy, torch.cat([IDS, other]))[0]
    torch.testing.assert_close(together.log_softmax(-1), logprobs(policy)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_weights_that_it_samples_with(kind, wide):
    """Against the same numbers as ordinary weights: the layers' products with the identity."""
    policy, _ = load_policy(wide, quantise=kind)
    dense, _ = load_policy(wide)
    for name, layer in dense.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            with torch.no_grad():
                layer.weight.copy_(policy.get_submodule(name)(torch.eye(layer.in_features)).T)
    found = []
    for model in (policy, dense):
        add_adapter(model, Lora(lora_rank=2), seed=0)
        with torch.no_grad():
            for name, weight in trainable(model).items():
                if ".lora_B." in name:
                    weight.fill_(0.01)
        policy_logits(model, IDS).logsumexp(-1).sum().backward()
        found.append(torch.cat([weight.grad.flatten() for weight in trainable(model).values()]))
    if kind == "4bit":
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
    else:  # products in 8 bits round their input too
        assert torch.cosine_similarity(*found, dim=0) > 0.95


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["grpo", "reward"])
def test_a_run_resumes_and_its_adapter_loads_on_whole_weights(name, kind, here, wide):
    line = f"{LINES[name]} --lora-rank 2 --learning-rate 1e-2 --quantise {kind} --dtype bfloat16 --quiet --model {wide}"
    assert_resumes(line)
    load = load_reward_model if name == "reward" else load_policy
    for quantise in ("none", kind):
        model, _ = load(str(here / "whole" / "model"), quantise=quantise)
        assert is_quantised(model) == (quantise == kind)
    assert tether("merge whole/model --out merged") == 0
    merged, _ = load(str(here / "merged"))
    assert not is_quantised(merged)


def test_it_needs_an_adapter_to_be_trained(wide, here, capfd):
    assert tether(f"{LINES['grpo']} --quantise 4bit --model {wide} --out out") == 2
    assert "--quantise: weights of 4bit cannot be trained; give --lora-rank" in capfd.readouterr().err
    assert not (here / "out").exists()


def test_four_bits_that_the_library_does_not_give_back_are_refused(tiny, here, capfd):
    """Rows of 32 weights, half a block."""
    exact = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    packed, state = quantize_4bit(exact, quant_type="nf4")
    if (dequantize_4bit(packed, state) - exact).norm() / exact.norm() < 0.15:
        pytest.skip("this version of bitsandbytes gives them back")
    assert tether(f"{LINES['grpo']} --quantise 4bit --lora-rank 2 --model {tiny} --out out") == 2
    line = capfd.readouterr().err
    assert f"{tiny}: bitsandbytes does not give back 4-bit weights of width" in line
    assert "use --quantise 8bit" in line
    assert not (here / "out").exists()


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"4bit need the package bitsandbytes; pip install 'tether-rlhf\[quantise\]'"):
        quantisation("4bit", dtype=torch.float32, device="cpu")
    assert quantisation("none", dtype=torch.float32, device="cpu") == {}


def test_importing_the_library_fetches_no_code(monkeypatch):
    fetched = ModuleType("kernels")
    fetched.get_kernel = lambda *_, **__: pytest.fail("code was fetched from the hub")
    monkeypatch.setitem(sys.modules, "kernels", fetched)
    for name in [name for name in sys.modules if name.startswith("bitsandbytes.backends.cpu")]:
        monkeypatch.delitem(sys.modules, name)
    import_bitsandbytes()
    assert sys.modules["kernels"] is fetched
