"""On a CUDA device: the engine, the training pass and whole runs do there what they do on a CPU."""

from __future__ import annotations

import pytest
import torch

from commandline import numbers, tether, workspace
from runs import LINES
from tether.generation.engine import Engine
from tether.generation.naive import NaiveGenerator
from tether.models.adapters import Lora, add_adapter
from tether.models.loading import load_policy
from tether.models.policy import completion_logprobs
from tether.models.trainable import trainable
from tether.types import Batch, Prompt, Sampling, make_requests

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROWS = [((0, 70, 71), (9, 200, 1)), ((0, 70, 71), (31, 5)), ((0, 5), (6, 7, 8, 9))]
FAMILIES = ("llama", "gpt2", "gemma2", "qwen3", "mistral")


def logprobs(model):
    batch = Batch.collate(ROWS, model.device)
    return completion_logprobs(model, batch, temperature=1.0)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_training_pass_and_its_gradient_are_those_of_the_cpu(family, tiny_models):
    found = []
    for device in ("cpu", "cuda"):
        model, _ = load_policy(tiny_models[family], device=device)
        logp = logprobs(model)
        logp.sum().backward()
        gradient = torch.cat([p.grad.flatten().cpu() for p in trainable(model).values() if p.grad is not None])
        found.append((logp.detach().cpu(), gradient))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=1e-3)
    assert torch.cosine_similarity(found[1][1], found[0][1], dim=0) > 0.999


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_samples_what_generation_without_a_cache_samples(family, tiny_models):
    model, tokenizer = load_policy(tiny_models[family], device="cuda")
    prompts = [Prompt(ids=(0, 70 + i), text="") for i in range(3)]
    asked, sampling = make_requests(prompts, group_size=4, seed=0), Sampling(max_new_tokens=12)
    found, expected = (
        [c for group in kind(model, tokenizer).generate(asked, sampling=sampling) for c in group.completions]
        for kind in (Engine, NaiveGenerator)
    )
    same = [one.ids == other.ids for one, other in zip(found, expected, strict=True)]
    assert sum(same) >= len(same) - 1  # rounding may turn one draw
    for one in (c for c, equal in zip(found, same, strict=True) if equal):
        assert len(one.sampler_logp) == len(one.ids)


def test_with_an_adapter_the_sampler_is_the_policy_that_is_trained(tiny):
    model, tokenizer = load_policy(tiny, device="cuda")
    add_adapter(model, Lora(lora_rank=4), seed=0)
    with torch.no_grad():
        for weight in trainable(model).values():
            weight.add_(0.05 * torch.randn_like(weight))
    (group,) = Engine(model, tokenizer).generate(
        make_requests([Prompt(ids=(0, 70), text="")], group_size=4, seed=0), sampling=Sampling(max_new_tokens=8)
    )
    rows = [(group.prompt.ids, c.ids) for c in group.completions]
    with torch.no_grad():
        (logp,) = completion_logprobs(model, Batch.collate(rows, model.device), temperature=1.0)
    for row, completion in enumerate(group.completions):
        known = logp[row, : len(completion.ids)].cpu()
        torch.testing.assert_close(torch.tensor(completion.sampler_logp), known, rtol=0, atol=1e-3)


@pytest.mark.parametrize("options", ["", "--dtype bfloat16", "--lora-rank 2"])
@pytest.mark.parametrize("name", LINES)
def test_a_run_is_interrupted_and_resumed(name, options, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    line = f"{LINES[name]} {options} --device cuda --quiet --model {tiny}"
    assert tether(f"{line} --out whole") == 0
    assert tether(f"{line} --stop-after 0.001s --out cut") == 75
    assert tether("resume cut --stop-after 10m") == 0
    whole, cut = numbers(tmp_path / "whole"), numbers(tmp_path / "cut")
    assert whole["summary"]["last"][0].keys() == cut["summary"]["last"][0].keys()
    rows, again = whole["metrics.jsonl"], cut["metrics.jsonl"]
    assert [row["step"] for row in again] == [row["step"] for row in rows]
    if name in ("sft", "reward", "dpo"):  # where nothing is sampled, rounding cannot turn a draw
        assert [row["loss"] for row in again] == pytest.approx([row["loss"] for row in rows], rel=0.02, abs=1e-3)
