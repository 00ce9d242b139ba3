"""A model, a tokenizer, a chat template or a data set runs no code and fetches nothing."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from commandline import tether, write_rows
from hostile import GRPO, MARKER, RUNS, TASK, complaint
from tether.models.adapters import Lora, add_adapter
from tether.models.loading import load_policy
from tether.models.saving import save_model

AUTO = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")


class Touch:
    """Makes the marker when it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {MARKER}",)


def settle(file: str, **values) -> Callable[[Path], None]:
    """Set entries of one of a model's JSON files, and put Python code beside it."""

    def change(model: Path) -> None:
        (model / file).write_text(json.dumps({**json.loads((model / file).read_text()), **values}))
        (model / "evil.py").write_text(RUNS)

    return change


def pickled_weights(name: str) -> Callable[[Path], None]:
    """The weights as a pickle that makes the marker, under ``name``."""

    def change(model: Path) -> None:
        (model / "model.safetensors").unlink()
        (model / name).write_bytes(pickle.dumps(Touch()))

    return change


def index_of(file: str) -> Callable[[Path], None]:
    """Weights in several files, the first of them a pickle beside the model or a file elsewhere."""

    def change(model: Path) -> None:
        pickled_weights("pytorch_model.bin")(model)
        index = {"metadata": {}, "weight_map": {"lm_head.weight": file}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def adapter(model: Path) -> None:
    """A peft adapter of the model in its place, whose configuration names a library to import."""
    base = model.rename(model.with_name("base"))
    policy, tokenizer = load_policy(str(base))
    add_adapter(policy, Lora(lora_rank=1), seed=0)
    save_model(policy, tokenizer, model)
    mapping = {"base_model_class": "A", "parent_library": "evil"}
    settle("adapter_config.json", base_model_name_or_path=str(base), auto_mapping=mapping)(model)


def pickled_adapter(model: Path) -> None:
    adapter(model)
    (model / "adapter_model.safetensors").unlink()
    (model / "adapter_model.bin").write_bytes(pickle.dumps(Touch()))


def own_generation(model: Path) -> None:
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(RUNS)


IGNORED = {
    "code for a known architecture": settle("config.json", auto_map=dict.fromkeys(AUTO, "evil.A")),
    "code for a known tokenizer": settle("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.A", "evil.A"]}),
    "code for generation": own_generation,
    "code for an adapter": adapter,
}
REFUSED = {
    "code for an unknown architecture": (
        settle("config.json", auto_map=dict.fromkeys(AUTO, "evil.A"), model_type="evil", architectures=["A"]),
        "custom code",
    ),
    "code of another repository": (
        settle("config.json", auto_map=dict.fromkeys(AUTO, "nobody/nothing--evil.A"), model_type="evil"),
        "cannot be read",
    ),
    "code for an unknown tokenizer": (
        settle("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.A", "evil.A"]}, tokenizer_class="A"),
        "custom code",
    ),
    "pickled weights": (pickled_weights("pytorch_model.bin"), "weights in a pickle are not loaded"),
    "a pickle named safetensors": (pickled_weights("model.safetensors"), "cannot be loaded"),
    "a pickled adapter": (pickled_adapter, "adapter_model.safetensors is missing (a pickle is not loaded)"),
}
WITHHELD = {
    "a kernel from the hub": (settle("config.json", _attn_implementation="nobody/nothing:f"), "nobody/nothing:f"),
    "an index that names a pickle": (index_of("pytorch_model.bin"), "'pytorch_model.bin'"),
    "an index that points elsewhere": (index_of("../other/model.safetensors"), "'../other/model.safetensors'"),
}
"""Refused before transformers would fetch, unpickle or follow them."""


@pytest.mark.parametrize("kind", IGNORED)
def test_code_that_comes_with_a_model_is_ignored(kind, model):
    IGNORED[kind](model)
    assert tether(f"{TASK} --model m --out out --quiet") == 0
    assert not Path(MARKER).exists()


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_needs_code_or_a_pickle_is_refused(kind, model, capfd, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    change, says = REFUSED[kind]
    change(model)
    assert says in complaint(f"{TASK} --model m --out out", capfd)
    assert not Path("out").exists()


@pytest.mark.parametrize("kind", WITHHELD)
def test_what_a_model_asks_for_elsewhere_is_withheld(kind, model, capfd, monkeypatch):
    monkeypatch.setattr("torch.load", lambda *_, **__: pytest.fail("torch.load was called"))
    change, says = WITHHELD[kind]
    change(model)
    said = complaint(f"{TASK} --model m --out out", capfd)
    assert "json" in said
    assert says in said


def test_the_hostile_pickle_runs_code(here):
    """Otherwise the tests above would prove nothing."""
    pickle.loads(pickle.dumps(Touch()))
    assert Path(MARKER).exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch marker') }}",
        "{{ lipsum.__globals__['os'].popen('touch marker').read() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_chat_template_stays_in_its_sandbox(template, model, capfd):
    (model / "chat_template.jinja").write_text(template)
    write_rows(Path("chat.jsonl"), [{"prompt": [{"role": "user", "content": "hi"}]}])
    said = complaint(f"{GRPO} --prompts chat.jsonl --reward r.py:fn --model m --out out", capfd)
    assert "the chat template of m refuses the conversation" in said
    assert "unsafe" in said


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for i in range(99999999) %}x{% endfor %}", "Range too big"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_a_chat_template_that_fails_is_an_error_of_one_line(template, says, model, capfd):
    (model / "chat_template.jinja").write_text(template)
    write_rows(Path("chat.jsonl"), [{"prompt": [{"role": "user", "content": "hi"}]}])
    assert says in complaint(f"{GRPO} --prompts chat.jsonl --reward r.py:fn --model m --out out", capfd)


def test_a_script_that_comes_with_data_is_not_run(here, tiny, capfd):
    data = here / "data"
    data.mkdir()
    (data / "data.py").write_text(RUNS)
    assert "data" in complaint(f"{GRPO} --prompts data --reward r.py:fn --out out --model", capfd, tiny)
