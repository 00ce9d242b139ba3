"""What tokenizers and generation configurations hold: templates, ends, and tokens beyond the embedding."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from commandline import read_rows, tether, write_rows
from tether.api.measuring import generate
from tether.errors import DataError, ModelError
from tether.generation.engine import Engine
from tether.models.loading import (
    eos_ids,
    load_policy,
    load_tokenizer,
    unembedded,
)
from tether.models.reward import load_reward_model, new_reward_model, save_reward_model
from tether.models.saving import save_model
from tether.types import Prompt, Sampling, make_requests
from tiny import byte_tokenizer, edit_config, refused

IDS = torch.tensor([[0, 5, 9, 200, 31, 1]])


TEMPLATES = {
    "default": byte_tokenizer(True).chat_template,
    "tool_use": "{{ messages }} tools",
    "rag": "{{ documents }}",
}


def as_list(templates: dict[str, str]) -> list[dict[str, str]]:
    """As older tokenizers write several templates."""
    return [{"name": name, "template": template} for name, template in templates.items()]


@pytest.fixture(params=["directory", "list"])
def many_templates(request, broken) -> Path:
    """A model with several chat templates, as Command R and Hermes have them."""
    directory = broken()
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(directory)
    if request.param == "list":
        shutil.rmtree(directory / "additional_chat_templates")
        (directory / "chat_template.jinja").unlink()
        path = directory / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": as_list(TEMPLATES)}))
    return directory


def test_several_chat_templates_are_kept(many_templates, tmp_path):
    model, tokenizer = load_policy(str(many_templates))
    assert tokenizer.chat_template == TEMPLATES
    save_model(model, tokenizer, tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved")).chat_template == TEMPLATES
    reward_model, tokenizer = new_reward_model(str(many_templates), seed=0)
    save_reward_model(reward_model, tokenizer, tmp_path / "rm", [((0, 5), (6, 1)), ((0,), (9, 1))])
    assert load_reward_model(str(tmp_path / "rm"))[1].chat_template == TEMPLATES


def test_a_run_with_several_chat_templates_reaches_its_checkpoints(many_templates, tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    data = write_rows(tmp_path / "data.jsonl", [{"messages": turns}] * 8)
    out = tmp_path / "run"
    options = "--epochs 1 --batch-size 4 --save-every 1 --keep-checkpoints"
    assert tether(f"sft {options} --model", many_templates, "--data", data, "--out", out) == 0
    saved = [*out.glob("checkpoints/*/model"), out / "model"]
    assert len(saved) > 1
    for model in saved:
        assert load_tokenizer(str(model)).chat_template == TEMPLATES


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("</s>", (1,)),
        (["</s>", 5], (1, 5)),
        ("259", (1, 259)),  # digits are an id where no token is written so
        (["<pad>", "7"], (1, 2, 25)),  # "7" is a token here
        (-1, (1,)),  # as some configurations say that there is none
        (9999, (1,)),  # has no embedding: it is never drawn
        (None, (1,)),
    ],
)
def test_an_end_may_be_given_as_text(broken, stated, expected):
    directory = broken()
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
    model, tokenizer = load_policy(str(directory))
    assert eos_ids(model, tokenizer) == expected
    sampling = Sampling(max_new_tokens=3, min_new_tokens=2)
    Engine(model, tokenizer).generate(
        make_requests([Prompt(ids=(5,), text="")], group_size=1, seed=0), sampling=sampling
    )
    save_model(model, tokenizer, directory / "saved")
    assert eos_ids(*load_policy(str(directory / "saved"))) == expected


@pytest.mark.parametrize("stated", ["nonesuch", True, 1.5, {"a": 1}, [["</s>"]]])
def test_an_end_that_is_no_token_is_refused(broken, stated):
    directory = broken()
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
    refused(directory, "eos_token_id is .* no id and no token; correct generation_config.json or config.json")


def test_a_configuration_that_the_library_does_not_read_says_why(broken):
    directory = broken()
    edit_config(directory, eos_token_id="</s>")
    refused(directory, r"the configuration cannot be read \(Validation error for field 'eos_token_id': \w+")


@pytest.mark.parametrize(
    ("stated", "kept"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": False, "top_k": 5}, {"do_sample": True, "top_k": 5}),
        ({"num_beams": 1, "length_penalty": 2.0, "eos_token_id": 7, "pad_token_id": 2}, {"eos_token_id": 7}),
        ({"pad_token_id": -1, "eos_token_id": [1, 7]}, {"eos_token_id": [1, 7], "pad_token_id": None}),
    ],
)
def test_a_generation_configuration_that_is_called_invalid_can_be_saved(broken, stated, kept):
    """Newer versions of the library warn where older ones raise."""
    directory = broken()
    (directory / "generation_config.json").write_text(json.dumps(stated))
    model, tokenizer = load_policy(str(directory))
    model.generation_config.validate(strict=True)
    save_model(model, tokenizer, directory / "saved")
    saved = json.loads((directory / "saved" / "generation_config.json").read_text())
    assert {name: saved.get(name) for name in kept} == kept


@pytest.mark.parametrize("stated", [{"num_return_sequences": 4}, {"max_new_tokens": 0}, {"pad_token_id": "<pad>"}, [1]])
def test_a_generation_configuration_that_the_library_does_not_read_is_one_line(broken, stated):
    directory = broken()
    (directory / "generation_config.json").write_text(json.dumps(stated))
    refused(directory, r"the model cannot be loaded \(.+\)$")


def test_a_model_without_an_embedding_of_tokens_is_refused(tiny, monkeypatch):
    def missing(self):
        raise NotImplementedError("not handled")

    monkeypatch.setattr(LlamaForCausalLM, "get_input_embeddings", missing)
    with pytest.raises(ModelError, match="no embedding of tokens"):
        load_policy(tiny)


# -- tokens beyond the embedding --------------------------------------------------------------------------------------


@pytest.fixture
def beyond(broken) -> Path:
    """A text model whose tokenizer knows a special token more than its embedding, as Gemma 3's."""
    directory = broken()
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(f"<unused{i}>", special=True) for i in range(5)])  # to the last row
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    assert tokenizer.convert_tokens_to_ids("<image>") == 264
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("load", [load_policy, lambda name: new_reward_model(name, seed=0)])
def test_a_special_token_beyond_the_embedding_is_refused_only_in_data(beyond, load):
    model, tokenizer = load(str(beyond))
    ids = torch.tensor([tokenizer("plain text")["input_ids"]])
    with torch.no_grad():
        for copied in (model, copy.deepcopy(model)):
            copied.base_model(input_ids=ids)
            with pytest.raises(ModelError, match="the data holds '<image>', for which the model has no embedding"):
                copied.base_model(input_ids=torch.tensor([tokenizer("an <image>")["input_ids"]]))
    assert unembedded(tokenizer, 264) == {264: "<image>"}


def test_a_model_with_a_token_beyond_the_embedding_trains_and_is_saved(beyond, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "a", "completion": " b"}] * 4)
    out = tmp_path / "run"
    assert tether("sft --batch-size 4 --model", beyond, "--data", data, "--out", out) == 0
    model, tokenizer = load_policy(str(out / "model"))
    assert model.get_input_embeddings().num_embeddings == 264
    assert tokenizer.convert_tokens_to_ids("<image>") == 264


def test_data_with_a_token_beyond_the_embedding_is_one_line(beyond, tmp_path, capsys):
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "an <image>", "completion": " b"}] * 4)
    assert tether("sft --batch-size 4 --model", beyond, "--data", data, "--out", tmp_path / "run") == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "data.jsonl:1: holds '<image>', for which the model has no embedding" in last


def test_a_prompt_with_a_token_beyond_the_embedding_is_one_line_from_python_too(beyond):
    with pytest.raises(DataError, match="prompts:row 2: holds '<image>', for which the model has no embedding"):
        generate(str(beyond), ["a", "an <image>"], max_new_tokens=2)


def test_a_row_with_a_token_beyond_the_embedding_can_be_left_out_and_one_that_is_cut_away_is_no_error(beyond, tmp_path):
    data = write_rows(
        tmp_path / "data.jsonl", [{"prompt": "a", "completion": " b"}, {"prompt": "<image>", "completion": "b"}]
    )
    line = f"sft --batch-size 4 --model {beyond} --quiet --data"
    assert tether(line, data, "--out", tmp_path / "one", "--on-bad-rows", "skip") == 0
    (found,) = read_rows(tmp_path / "one" / "skipped.jsonl")
    assert (found["kind"], found["row"]["prompt"]) == ("token without embedding", "<image>")
    row = {"prompt": "<image>" + "a" * 200, "completion": " b"}
    assert (
        tether(line, write_rows(tmp_path / "cut.jsonl", [row]), "--out", tmp_path / "two", "--overlong", "truncate")
        == 0
    )


@pytest.mark.parametrize("token", [AddedToken("<word>", special=False), {"eos_token": "<end>"}, {"pad_token": "<p>"}])
def test_words_and_ends_beyond_the_embedding_are_refused(beyond, token):
    tokenizer = load_tokenizer(str(beyond))
    if isinstance(token, dict):
        tokenizer.add_special_tokens(token)
    else:
        tokenizer.add_tokens([token])
    tokenizer.save_pretrained(beyond)
    refused(beyond, "the tokenizer does not belong to the model: it gives ids up to 265 .* embedding has 264 rows")
