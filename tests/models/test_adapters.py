"""Adapters: put in, switched off, trained, saved, loaded by peft and by tether, merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from commandline import tether
from tether.errors import ConfigError, ModelError
from tether.models.adapters import (
    Lora,
    adapter_dropout,
    adapter_off,
    add_adapter,
    changes_nothing,
    lean_linear,
    merge_adapter,
    of_adapter,
    peft_linear,
)
from tether.models.linear import round_matmuls
from tether.models.loading import load_policy, load_tokenizer
from tether.models.policy import policy_logits
from tether.models.reference import AdapterOff, FormerAdapter, reference_of
from tether.models.reward import load_reward_model, new_reward_model, save_reward_model, score_sequences
from tether.models.saving import save_model
from tether.models.trainable import trainable

IDS = torch.tensor([[0, 70, 71, 9, 200, 31], [0, 5, 6, 7, 8, 9]])
ROWS = [((0, 70, 71), (9, 200)), ((0, 5), (6, 7, 8, 9)), ((0, 5), (31,))]
VARIANTS = ("lora", "rslora", "dora")
FAMILIES = ("llama", "gpt2", "gpt_neox", "gemma2", "qwen3")
NEAR = {"rtol": 0, "atol": 1e-5}

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # in peft


def moved(model, *, seed=0):
    """The model after training has moved all that it trains."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in trainable(model).values():
            weight.add_(0.05 * torch.randn_like(weight))
    return model


def adapted(source, **options):
    """The policy at ``source`` with an adapter that changes it, and its tokenizer."""
    policy, tokenizer = load_policy(source)
    add_adapter(policy, Lora(**{"lora_rank": 2} | options), seed=0)
    return moved(policy), tokenizer


@torch.no_grad()
def logprobs(model):
    return policy_logits(model, IDS).log_softmax(-1)


@torch.no_grad()
def librarys(model):
    """The log-probs of the library's own forward pass."""
    return model(input_ids=IDS).logits.float().log_softmax(-1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_adapter_changes_nothing_and_one_that_is_off_is_not_there(family, variant, tiny_models):
    policy, _ = load_policy(tiny_models[family])
    before = logprobs(policy)
    add_adapter(policy, Lora(lora_rank=2, lora_variant=variant), seed=0)
    assert changes_nothing(policy)
    torch.testing.assert_close(logprobs(policy), before, **NEAR)
    moved(policy)
    assert not changes_nothing(policy)
    assert (logprobs(policy) - before).abs().max() > 0.01
    with adapter_off(policy):
        assert torch.equal(logprobs(policy), before)
    assert (logprobs(policy) - before).abs().max() > 0.01


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_what_tether_peft_and_a_merged_model_load(family, variant, tiny_models, tmp_path):
    policy, tokenizer = adapted(tiny_models[family], lora_variant=variant)
    expected = logprobs(policy)
    save_model(policy, tokenizer, tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").glob("*.safetensors")) == ["adapter_model.safetensors"]

    again, _ = load_policy(str(tmp_path / "adapter"))
    assert torch.equal(logprobs(again), expected)
    assert trainable(again).keys() == trainable(policy).keys()

    base = AutoModelForCausalLM.from_pretrained(tiny_models[family])
    theirs = librarys(peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval())
    torch.testing.assert_close(theirs, expected, **NEAR)

    assert tether("merge", tmp_path / "adapter", "--out", tmp_path / "whole") == 0
    torch.testing.assert_close(logprobs(load_policy(str(tmp_path / "whole"))[0]), theirs, **NEAR)
    torch.testing.assert_close(librarys(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), theirs, **NEAR)


def test_an_adapter_of_peft_is_loaded(tiny, tmp_path):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    policy, _ = load_policy(str(tmp_path / "theirs"))  # the tokenizer is the base's
    torch.testing.assert_close(logprobs(policy), librarys(theirs), **NEAR)


def test_the_lean_forward_pass_is_that_of_peft(tiny):
    """With its gradients, in float32 and with rounded products."""
    for rounded in (False, True):
        found = []
        for lean in (True, False):
            policy, _ = adapted(tiny)
            if rounded:
                round_matmuls(policy)
            layers = [layer for layer in policy.modules() if type(layer) is lean_linear()]
            assert len(layers) == 2 * 7
            if not lean:
                for layer in layers:
                    layer.__class__ = peft_linear()
            logits = policy_logits(policy, IDS)
            logits.logsumexp(-1).sum().backward()
            found.append((logits.detach(), [weight.grad for weight in trainable(policy).values()]))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_only_the_adapter_is_trained_in_float32_whatever_the_precision_of_the_base(tiny):
    policy, _ = load_policy(tiny, dtype=torch.bfloat16)
    add_adapter(policy, Lora(lora_rank=2), seed=0)
    assert {weight.dtype for weight in trainable(policy).values()} == {torch.float32}
    assert all(map(of_adapter, trainable(policy)))
    assert {weight.dtype for name, weight in policy.named_parameters() if not of_adapter(name)} == {torch.bfloat16}


def test_the_seed_decides_the_adapter_and_the_callers_generator_stays(tiny):
    torch.manual_seed(7)
    expected = torch.rand(1)
    drawn = []
    for seed in (0, 0, 1):
        policy, _ = load_policy(tiny)
        torch.manual_seed(7)
        add_adapter(policy, Lora(lora_rank=2), seed=seed)
        assert torch.equal(torch.rand(1), expected)
        drawn.append(torch.cat([weight.flatten() for weight in trainable(policy).values()]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_targets_are_names_of_layers(tiny):
    policy, _ = load_policy(tiny)
    add_adapter(policy, Lora(lora_rank=2, lora_targets="q_proj, v_proj"), seed=0)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trainable(policy)} == {"q_proj", "v_proj"}
    policy, _ = load_policy(tiny)
    with pytest.raises(ConfigError, match=r"no layer named 'qproj'; it has embed_tokens, q_proj, .*, lm_head"):
        add_adapter(policy, Lora(lora_rank=2, lora_targets="q_proj,qproj"), seed=0)


def test_the_scale_is_alpha_over_the_rank(tiny):
    for options, scale in (
        ({}, 2.0),
        ({"lora_alpha": 1.0}, 0.25),
        ({"lora_alpha": 1.0, "lora_variant": "rslora"}, 0.5),
    ):
        policy, _ = load_policy(tiny)
        layer = policy.model.layers[0].self_attn.q_proj
        before = layer.weight.detach().clone()
        add_adapter(policy, Lora(lora_rank=4, **options), seed=0)
        moved(policy)
        layer = policy.model.layers[0].self_attn.q_proj
        expected = before + scale * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        merge_adapter(policy)
        torch.testing.assert_close(policy.model.layers[0].self_attn.q_proj.weight, expected)


def test_dropout_is_drawn_from_its_key_and_off_elsewhere(tiny):
    policy, _ = adapted(tiny, lora_dropout=0.5)
    plain = logprobs(policy)

    def dropped(*key):
        with adapter_dropout(policy, *key):
            return logprobs(policy)

    assert torch.equal(dropped(0, "update"), dropped(0, "update"))
    assert not torch.equal(dropped(0, "update"), dropped(1, "update"))
    assert not torch.equal(dropped(0, "update"), plain)
    assert torch.equal(logprobs(policy), plain)


def test_the_reference_of_a_new_adapter_is_the_model_without(tiny):
    policy, _ = load_policy(tiny)
    before = logprobs(policy)
    add_adapter(policy, Lora(lora_rank=2), seed=0)
    reference = reference_of(policy)
    assert isinstance(reference, AdapterOff)
    moved(policy)
    with reference.model() as model:
        assert torch.equal(logprobs(model), before)
        assert trainable(model) == {}


def test_the_reference_of_an_adapter_that_goes_on_is_the_adapter_as_it_was(tiny, tmp_path):
    policy, tokenizer = adapted(tiny)
    save_model(policy, tokenizer, tmp_path / "adapter")
    policy, _ = load_policy(str(tmp_path / "adapter"))
    before, count = logprobs(policy), len(trainable(policy))
    reference = reference_of(policy)
    assert isinstance(reference, FormerAdapter)
    moved(policy, seed=1)
    after = logprobs(policy)
    with reference.model() as model:
        assert torch.equal(logprobs(model), before)
    assert torch.equal(logprobs(policy), after)
    assert len(trainable(policy)) == count


# ------------------------------------------------------------------------------------------------------ reward models


def test_a_reward_models_adapter_has_its_head_and_its_statistics(tiny, tmp_path):
    model, tokenizer = new_reward_model(tiny, seed=0)
    add_adapter(model, Lora(lora_rank=2), seed=0)
    assert "score.weight" in trainable(model)
    moved(model)
    model.config.score_mean, model.config.score_std = 0.5, 2.0
    expected = score_sequences(model, ROWS)
    save_reward_model(model, tokenizer, tmp_path / "adapter", ROWS)

    again, _ = load_reward_model(str(tmp_path / "adapter"))
    assert torch.equal(score_sequences(again, ROWS), expected)
    assert (again.config.score_mean, again.config.score_std) == (0.5, 2.0)

    assert tether("merge", tmp_path / "adapter", "--out", tmp_path / "whole") == 0
    whole, _ = load_reward_model(str(tmp_path / "whole"))
    torch.testing.assert_close(score_sequences(whole, ROWS), expected, **NEAR)
    assert (whole.config.score_mean, whole.config.score_std) == (0.5, 2.0)


def test_peft_gives_a_reward_models_adapter_the_same_scores(tiny, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model, tokenizer = new_reward_model(tiny, seed=0)
    add_adapter(model, Lora(lora_rank=2), seed=0)
    save_reward_model(moved(model), tokenizer, tmp_path / "adapter", ROWS)
    base = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    for (prompt, completion), expected in zip(ROWS, score_sequences(model, ROWS), strict=True):
        with torch.no_grad():
            found = theirs(input_ids=torch.tensor([[*prompt, *completion]])).logits.squeeze()
        torch.testing.assert_close(found, expected, **NEAR)


def test_a_policys_adapter_is_no_reward_model_and_the_reverse(tiny, tmp_path):
    policy, tokenizer = adapted(tiny)
    save_model(policy, tokenizer, tmp_path / "policy")
    with pytest.raises(ModelError, match="not a reward model"):
        load_reward_model(str(tmp_path / "policy"))
    model, tokenizer = new_reward_model(tiny, seed=0)
    add_adapter(model, Lora(lora_rank=2), seed=0)
    save_reward_model(model, tokenizer, tmp_path / "reward", ROWS)
    with pytest.raises(ModelError, match="a reward model where a language model is needed"):
        load_policy(str(tmp_path / "reward"))


# ------------------------------------------------------------------------------------------------------ what is wrong


def change_config(directory, **values):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def drop(tensors):
    tensors.pop(next(iter(tensors)))


def cut(tensors):
    name = next(iter(tensors))
    tensors[name] = tensors[name][:1].clone()


def spoil(tensors):
    tensors[next(iter(tensors))][0, 0] = float("nan")


WRONG = {
    "another kind": (lambda d: change_config(d, peft_type="IA3"), "an adapter of the kind 'IA3'; only LoRA is read"),
    "no base": (lambda d: change_config(d, base_model_name_or_path=None), "does not name its base"),
    "not JSON": (lambda d: (d / "adapter_config.json").write_text("{"), "adapter_config.json is not valid JSON"),
    "a base that is gone": (lambda d: change_config(d, base_model_name_or_path="gone/gone/gone"), "an adapter of gone"),
    "an adapter as its base": (lambda d: change_config(d, base_model_name_or_path=str(d)), "an adapter itself"),
    "other layers": (lambda d: change_config(d, target_modules=["c_attn"]), "peft cannot adapt LlamaForCausalLM"),
    "another rank": (lambda d: change_config(d, r=3), "the adapter does not fit its base"),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "a weight less": (lambda d: change_weights(d, drop), "the adapter does not fit its base"),
    "a weight of another shape": (lambda d: change_weights(d, cut), "the adapter does not fit its base"),
    "not a number": (lambda d: change_weights(d, spoil), "1 weights of the adapter are not finite"),
    "tied weights": (
        lambda d: change_config(d, modules_to_save=["embed_tokens"]),
        "tied to another weight",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(kind, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    policy, tokenizer = adapted(tiny)
    directory = tmp_path / "adapter"
    save_model(policy, tokenizer, directory)
    change, says = WRONG[kind]
    change(directory)
    with pytest.raises(ModelError) as caught:
        load_policy(str(directory))
    assert says in str(caught.value)
    assert str(directory) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_that_say_nothing_without_a_rank_are_refused():
    for options in ({"lora_alpha": 8.0}, {"lora_dropout": 0.1}):
        with pytest.raises(ConfigError, match="needs a lora_rank"):
            Lora(**options)
    for options in ({"lora_rank": -1}, {"lora_rank": 1, "lora_alpha": 0.0}, {"lora_rank": 1, "lora_targets": " ,"}):
        with pytest.raises(ConfigError):
            Lora(**options)


def test_without_peft_adapters_say_what_to_install(tiny, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    policy, _ = load_policy(tiny)
    with pytest.raises(ConfigError, match=r"need the package peft; pip install 'tether-rlhf\[lora\]'"):
        add_adapter(policy, Lora(lora_rank=2), seed=0)


def test_merge_takes_adapters_and_replaces_no_model_unasked(tiny, tmp_path, capfd):
    assert tether("merge", tiny, "--out", tmp_path / "out") == 2
    assert "not an adapter, so there is nothing to merge" in capfd.readouterr().err
    policy, tokenizer = adapted(tiny)
    save_model(policy, tokenizer, tmp_path / "adapter")
    shutil.copytree(tiny, tmp_path / "out")
    assert tether("merge", tmp_path / "adapter", "--out", tmp_path / "out") == 2
    assert "holds a model already; name another directory, or set overwrite" in capfd.readouterr().err
    assert tether("merge", tmp_path / "adapter", "--out", tmp_path / "out", "--overwrite") == 0
    torch.testing.assert_close(logprobs(load_policy(str(tmp_path / "out"))[0]), logprobs(policy), **NEAR)


def test_the_base_of_the_package_is_found_from_another_installation(tmp_path):
    policy, _ = load_policy("base")
    add_adapter(policy, Lora(lora_rank=1), seed=0)
    save_model(policy, load_tokenizer("base"), tmp_path / "adapter")
    written = Path(json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"])
    change_config(tmp_path / "adapter", base_model_name_or_path=str(Path("/elsewhere", *written.parts[-3:])))
    assert torch.equal(logprobs(load_policy(str(tmp_path / "adapter"))[0]), logprobs(policy))
