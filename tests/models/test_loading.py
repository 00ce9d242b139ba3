"""Causal language models from disk and back, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, GptOssConfig

from commandline import assert_resumes, read_rows, workspace
from runs import LINES
from tether.errors import ConfigError, ModelError
from tether.models.loading import (
    context_length,
    eos_ids,
    load_policy,
    load_pretrained,
    load_tokenizer,
    model_config,
    resolve,
)
from tether.models.policy import policy_logits
from tether.models.reward import new_reward_model
from tether.models.saving import save_model
from tiny import ARCHITECTURES, byte_tokenizer, edit_config, refused

IDS = torch.tensor([[0, 5, 9, 200, 31, 1]])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_survives_a_save(tiny_models, tmp_path, architecture):
    model, tokenizer = load_policy(tiny_models[architecture])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)  # trained a little
        expected = policy_logits(model, IDS)
    save_model(model, tokenizer, tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").glob("*.bin")] == []
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(reloaded(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("héllo")["input_ids"] == tokenizer("héllo")["input_ids"]
    again, _ = load_policy(str(tmp_path / "saved"))
    with torch.no_grad():
        torch.testing.assert_close(policy_logits(again, IDS), expected, rtol=1e-5, atol=1e-5)


def test_a_save_replaces_a_model_only_if_it_is_asked_to_and_nothing_else_ever(tiny, tmp_path):
    model, tokenizer = load_policy(tiny)
    target = tmp_path / "saved"
    target.mkdir()
    save_model(model, tokenizer, target)  # an empty directory may be there
    (target / "model-00002-of-00002.safetensors").write_bytes(b"of an earlier, larger model")
    with torch.no_grad():
        model.model.norm.weight.fill_(3.0)
    with pytest.raises(ConfigError, match=r"saved: holds a model already; .* set overwrite"):
        save_model(model, tokenizer, str(target))
    assert load_file(target / "model.safetensors")["model.norm.weight"].max() < 3
    save_model(model, tokenizer, target, overwrite=True)
    assert load_file(target / "model.safetensors")["model.norm.weight"].min() == 3
    assert not (target / "model-00002-of-00002.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    for path in (tmp_path / "notes", tmp_path / "notes" / "a.txt"):
        with pytest.raises(ConfigError, match="is there already, and is no model"):
            save_model(model, tokenizer, path, overwrite=True)
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"


def test_half_precision_on_disk_is_computed_with_in_full(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    save_model(model, byte_tokenizer(), tmp_path / "half")
    assert load_file(tmp_path / "half" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    full, _ = load_policy(str(tmp_path / "half"))
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    half, _ = load_policy(str(tmp_path / "half"), dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_tied_embeddings_stay_tied(tiny, tmp_path):
    model, tokenizer = load_policy(tiny)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    save_model(model, tokenizer, tmp_path / "saved")
    assert "lm_head.weight" not in load_file(tmp_path / "saved" / "model.safetensors")


def test_dropout_is_off(tmp_path, broken):
    directory = broken("gpt2")
    edit_config(directory, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model, _ = load_policy(str(directory))
    with torch.no_grad():
        assert torch.equal(policy_logits(model, IDS), policy_logits(model, IDS))


def test_sharded_weights(tiny, tmp_path):
    model, tokenizer = load_policy(tiny)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    again, _ = load_policy(str(tmp_path / "shards"))
    with torch.no_grad():
        assert torch.equal(policy_logits(again, IDS), policy_logits(model, IDS))


def test_the_real_model(stories, tmp_path):
    model, tokenizer = load_policy(stories)
    assert context_length(model) == 512
    assert eos_ids(model, tokenizer) == (2,)
    ids = torch.tensor([tokenizer("Once upon a time, there was a little girl named")["input_ids"]])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(stories).eval()(input_ids=ids).logits
        torch.testing.assert_close(policy_logits(model, ids), expected, rtol=1e-5, atol=1e-5)
    assert expected[0, -1].softmax(-1).max() > 0.3  # trained: it has an opinion


def test_the_embedded_model_by_name():
    assert (Path(resolve("base")) / "model.safetensors").is_file()


# -- refused --------------------------------------------------------------------------------------------------------


def test_no_such_model(tmp_path):
    refused(tmp_path / "nowhere", r"no such model; give a directory, a hub id \(owner/name\) or 'base'")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "a model is a directory in the Hugging Face layout, and this is a file")


def test_no_configuration(broken):
    directory = broken()
    (directory / "config.json").unlink()
    refused(directory, r"not a model directory: config.json is missing")


@pytest.mark.parametrize("content", ["{nope", ""])
def test_broken_configuration(broken, content):
    directory = broken()
    (directory / "config.json").write_text(content)
    refused(directory, r"valid JSON|config")
    with pytest.raises(ModelError, match="the configuration cannot be read"):
        model_config(str(directory))


def test_no_weights(broken):
    directory = broken()
    (directory / "model.safetensors").unlink()
    refused(directory, r"no weights: model.safetensors is missing$")
    (directory / "pytorch_model.bin").write_bytes(b"")
    refused(directory, r"no weights: model.safetensors is missing \(weights in a pickle are not loaded; convert them\)")


@pytest.mark.parametrize("kept", [0, 500, 20_000])
def test_weights_cut_short(broken, kept):
    weights = broken() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    refused(weights.parent, "the model cannot be loaded")


def test_a_missing_shard(broken):
    directory = broken()
    (directory / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(directory, r"the model cannot be loaded .*model-00001-of-00002.safetensors")


def test_missing_tensors_are_never_made_up(broken):
    directory = broken("qwen2")
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"], weights["model.norm.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    refused(directory, r"do not fit the configuration \(2 tensors, first model.layers.1.mlp.up_proj.weight\)")


def test_tensors_of_another_shape(broken):
    directory = broken("qwen2")
    edit_config(directory, intermediate_size=40)
    refused(directory, r"do not fit the configuration \(6 tensors, first model.layers.0.mlp.down_proj.weight\)")


def test_a_tokenizer_of_another_model(broken):
    directory = broken()
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(20)])
    tokenizer.save_pretrained(directory)
    refused(directory, "the tokenizer does not belong to the model: it gives ids up to 278 .* embedding has 264 rows")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "gpt_neox", "gemma"])
def test_a_tokenizer_is_never_made_up(broken, architecture):
    """Without files, transformers gives some architectures a tokenizer that knows its special tokens alone."""
    directory = broken(architecture)
    for path in directory.glob("token*"):
        path.unlink()
    refused(directory, "tokenizer")
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(str(directory))


def test_an_unknown_architecture(broken):
    directory = broken()
    edit_config(directory, model_type="nonesuch")
    refused(directory, "nonesuch")


def test_logits_that_are_not_what_the_hidden_states_say(broken, monkeypatch):
    model = load_pretrained(AutoModelForCausalLM, str(broken("gpt_neox")), dtype=torch.float32)
    forward = type(model).forward

    def scaled(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = out.logits * 2
        return out

    monkeypatch.setattr(type(model), "forward", scaled)
    with pytest.raises(ModelError, match="does something to its logits that tether does not know"):
        load_policy(model.config._name_or_path)


# -- read off a model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_context_length(tiny_models, architecture):
    assert context_length(load_policy(tiny_models[architecture])[0]) == 128


def test_every_end_counts(tiny):
    model, tokenizer = load_policy(tiny)
    model.generation_config.eos_token_id = [7, 5]
    assert eos_ids(model, tokenizer) == (1, 5, 7)
    model.generation_config.eos_token_id = None
    assert eos_ids(model, tokenizer) == (1,)
    tokenizer.eos_token = None
    assert eos_ids(model, tokenizer) == ()


@pytest.mark.parametrize("load", [load_policy, lambda name: new_reward_model(name, seed=0)])
def test_weights_that_are_not_finite_are_refused(tiny, tmp_path, load):
    model, tokenizer = load_policy(tiny)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    save_model(model, tokenizer, tmp_path / "diverged")
    with pytest.raises(ModelError, match=r"1 tensors hold weights that are not finite, the first is .*norm"):
        load(str(tmp_path / "diverged"))


@pytest.mark.parametrize("kind", ["gpt_oss", "bloom"])
def test_a_model_whose_prompts_cannot_be_shared_is_padded_and_says_so(kind, tmp_path, monkeypatch, capfd):
    """Attention sinks, a bias by distance; such a run resumes like any other."""
    shared = {"vocab_size": 264, "hidden_size": 32, "initializer_range": 0.3, "eos_token_id": 1, "pad_token_id": 2}
    config = {
        "gpt_oss": lambda: GptOssConfig(
            **shared, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=128,
        ),
        "bloom": lambda: BloomConfig(**shared, n_layer=2, n_head=4, seq_length=128),
    }[kind]()  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    line = f"{LINES['grpo']} --steps 2 --model {tmp_path}"
    assert_resumes(line)
    assert "is computed without sharing prompts between their completions" in capfd.readouterr().err
    assert read_rows(tmp_path / "whole" / "metrics.jsonl")[0]["sampling/logprob_gap_max"] < 1e-3


# -- weights that the model has no place for --------------------------------------------------------------------------


def add_weights(directory: Path, **shapes) -> None:
    """Put tensors of ones into the file of weights; ``__`` in a name is a dot."""
    file = directory / "model.safetensors"
    more = {name.replace("__", "."): torch.ones(shape) for name, shape in shapes.items()}
    save_file({**load_file(file), **more}, file, metadata={"format": "pt"})


def test_a_model_that_is_read_as_another_is_refused(broken):
    """Qwen 2 has biases, Llama has not: without them it would be another model."""
    directory = broken("qwen2")
    edit_config(directory, model_type="llama", architectures=["LlamaForCausalLM"], attention_bias=False)
    message = r"LlamaForCausalLM has no place for 6 of the weights in the file: model.layers.0.self_attn.k_proj.bias"
    refused(directory, message)
    with pytest.raises(ModelError, match=r"no place for 6 of the weights"):
        new_reward_model(str(directory), seed=0)


@pytest.mark.parametrize(
    "extra", ["v_head__summary__weight", "score__weight", "model__layers__2__mlp__up_proj__weight"]
)
def test_heads_and_layers_that_would_be_lost_are_named(broken, extra):
    directory = broken()
    add_weights(directory, **{extra: (1, 32)})
    refused(directory, f"has no place for 1 of the weights in the file: {extra.replace('__', '.')};")


@pytest.mark.parametrize(
    ("architecture", "extra"),
    [
        ("llama", "model__layers__0__self_attn__rotary_emb__inv_freq"),
        ("gpt2", "transformer__h__0__attn__bias"),
        ("gpt2", "transformer__h__0__attn__masked_bias"),
        ("gpt_neox", "gpt_neox__layers__1__attention__rotary_emb__inv_freq"),
        ("gpt_neox", "gpt_neox__layers__1__attention__masked_bias"),
        ("llama", "lm_head__weight"),  # tied to the embedding
    ],
)
def test_constants_of_older_versions_are_no_weights(broken, architecture, extra):
    directory = broken(architecture)
    add_weights(directory, **{extra: (264, 32) if "lm_head" in extra else (4,)})
    load_policy(str(directory))
    new_reward_model(str(directory), seed=0)
