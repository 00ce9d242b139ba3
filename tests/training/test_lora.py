"""Training with an adapter: all commands, from the start, resumed, and going on from an adapter."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from commandline import assert_resumes, numbers, read_rows, tether, workspace
from helpers import FunctionScorer
from runs import LINES
from tether.algorithms import grpo, ppo
from tether.algorithms.optimise import Optim
from tether.generation.engine import Engine
from tether.models.adapters import Lora, adapter_off, add_adapter, of_adapter
from tether.models.loading import load_policy
from tether.models.policy import completion_logprobs, policy_logits
from tether.models.reference import reference_of
from tether.models.reward import load_reward_model
from tether.runtime.directory import read_metrics
from tether.types import Batch, Prompt, Sampling, make_requests
from tiny import SHARED

IDS = torch.tensor([[0, 70, 71, 9, 200, 31]])
PIECES = SHARED / "models" / "stories260K"
ALWAYS = "--lora-rank 2 --learning-rate 1e-2 --quiet"
TUNED = ("sft", "rejection-sampling", "ppo", "grpo")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    return tmp_path


def logprobs(model):
    with torch.no_grad():
        return policy_logits(model, IDS).log_softmax(-1)


@pytest.mark.parametrize("name", LINES)
def test_model_is_an_adapter_and_its_base_is_as_it_was(name, here, tiny):
    assert tether(f"{LINES[name]} {ALWAYS} --keep-checkpoints --model {tiny} --out out") == 0
    names = {file.name for file in (here / "out" / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    weights = {file for file in (here / "out" / "checkpoints").rglob("*.safetensors") if file.parent.name == "model"}
    assert {file.name for file in weights} == {"adapter_model.safetensors"}
    load = load_reward_model if name == "reward" else load_policy
    model, _ = load(str(here / "out" / "model"))
    if name == "reward":
        return
    before, _ = load_policy(tiny)
    assert not torch.equal(logprobs(model), logprobs(before))
    with adapter_off(model):
        assert torch.equal(logprobs(model), logprobs(before))


@pytest.mark.parametrize("options", ["--dtype bfloat16", "--matmul-dtype bfloat16 --checkpoint-activations"])
@pytest.mark.parametrize("name", ["reward", "grpo"])
def test_other_precisions(name, options, here, tiny):
    line = f"{LINES[name]} {ALWAYS} {options} --model {tiny}"
    assert tether(f"{line} --out out") == 0
    assert tether(f"{line} --out again") == 0
    assert numbers(here / "out") == numbers(here / "again")
    saved = load_file(here / "out" / "model" / "adapter_model.safetensors")
    assert {weight.dtype for name, weight in saved.items() if "lora_" in name} == {torch.float32}


@pytest.mark.parametrize("variant", ["rslora", "dora"])
def test_variants_resume(variant, tiny):
    assert_resumes(f"{LINES['grpo']} {ALWAYS} --lora-variant {variant} --model {tiny}")


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_dropout_is_the_same_in_a_run_that_was_resumed(name, here, tiny):
    line = f"{LINES[name]} {ALWAYS} --model {tiny}"
    assert_resumes(f"{line} --lora-dropout 0.3")
    assert tether(f"{line} --out plain") == 0
    assert read_metrics(here / "plain")[-1]["loss"] != read_metrics(here / "whole")[-1]["loss"]


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_dropout_is_refused_where_log_probs_are_compared(name, here, tiny, capfd):
    assert tether(f"{LINES[name]} {ALWAYS} --lora-dropout 0.1 --model {tiny} --out out") == 2
    assert "lora_dropout is 0.1, and the update compares log-probs" in capfd.readouterr().err
    assert not (here / "out").exists()


@pytest.mark.parametrize("name", TUNED)
def test_an_adapter_goes_on_and_is_the_reference(name, here, tiny):
    assert tether(f"{LINES['sft']} {ALWAYS} --model {tiny} --out first") == 0
    line = f"{LINES[name]} --learning-rate 1e-2 --quiet --keep-checkpoints --model first/model"
    assert_resumes(line)  # when it is resumed, the adapter is not what the reference is
    first, second = (load_file(here / run / "model" / "adapter_model.safetensors") for run in ("first", "whole"))
    assert first.keys() == second.keys()
    assert not any(torch.equal(first[key], second[key]) for key in first)
    config = json.loads((here / "whole" / "model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == tiny
    if name == "grpo":
        assert read_rows(here / "whole" / "metrics.jsonl")[0]["kl"] == pytest.approx(0, abs=1e-5)


def test_a_rank_for_a_model_that_is_an_adapter_is_refused(here, tiny, capfd):
    assert tether(f"{LINES['sft']} {ALWAYS} --model {tiny} --out first") == 0
    assert tether(f"{LINES['sft']} {ALWAYS} --model first/model --out second") == 2
    assert "the model is an adapter already" in capfd.readouterr().err
    assert not (here / "second").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("algorithm", [grpo, ppo], ids=["grpo", "ppo"])
def test_after_every_update_the_engine_samples_from_the_policy_that_is_trained(algorithm, dtype, tiny):
    policy, tokenizer = load_policy(tiny, dtype=dtype)
    add_adapter(policy, Lora(lora_rank=4), seed=0)
    config = algorithm.Config(group_size=4, sampling=Sampling(max_new_tokens=6), optim=Optim(learning_rate=2e-2))
    state = algorithm.State.create(policy, config, reference=reference_of(policy), prompts=2, total_steps=4, seed=0)
    engine, scorer = Engine(policy, tokenizer), FunctionScorer(lambda _, completion: completion.ids[0] / 100)
    prompts, before = [Prompt(ids=(0, 70 + i), text=str(i)) for i in range(2)], None
    for step in range(4):
        algorithm.step(state, prompts, generator=engine, scorer=scorer, config=config)
        groups = engine.generate(make_requests(prompts, group_size=3, seed=step), sampling=config.sampling)
        rows = [(group.prompt.ids, completion.ids) for group in groups for completion in group.completions]
        drawn = torch.cat([torch.tensor(c.sampler_logp) for group in groups for c in group.completions])
        with torch.no_grad():
            (logp,) = completion_logprobs(policy, Batch.collate(rows), temperature=1.0)
        trained = torch.cat([logp[i, : len(ids)] for i, (_, ids) in enumerate(rows)])
        torch.testing.assert_close(drawn, trained.float(), rtol=0, atol=1e-5 if dtype == torch.float32 else 0.15)
        now = logprobs(policy)
        assert before is None or (now - before).abs().max() > 1e-3  # the step has moved it
        before = now


def test_the_optimizer_and_the_checkpoint_hold_the_adapter_alone(here, tiny):
    policy, _ = load_policy(tiny)
    add_adapter(policy, Lora(lora_rank=2), seed=0)
    trained = sum(weight.numel() for name, weight in policy.named_parameters() if of_adapter(name))
    assert tether(f"{LINES['sft']} {ALWAYS} --keep-checkpoints --model {tiny} --out out") == 0
    newest = max((here / "out" / "checkpoints").iterdir())
    held = sum(file.stat().st_size for file in newest.rglob("*") if file.suffix == ".safetensors")
    assert held < 3 * 4 * trained + 30_000  # the adapter and two moments, and the names


@pytest.mark.skipif(not PIECES.exists(), reason="needs ../shared/models/stories260K")
def test_a_real_model_is_interrupted_resumed_opened_by_peft_and_merged():
    import peft
    from transformers import AutoModelForCausalLM

    assert_resumes(f"{LINES['grpo']} --lora-rank 8 --quiet --model {PIECES}")
    assert tether("merge cut/model --out merged") == 0
    base = AutoModelForCausalLM.from_pretrained(PIECES)
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):  # in peft
        theirs = peft.PeftModel.from_pretrained(base, "cut/model").eval()
    merged, _ = load_policy("merged")
    with torch.no_grad():
        expected = theirs(input_ids=IDS).logits.log_softmax(-1)
    torch.testing.assert_close(logprobs(merged), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("command", ["generate --prompts p.jsonl --max-new-tokens 4 --out g.jsonl --model"])
def test_commands_that_take_a_model_take_an_adapter(command, here, tiny):
    assert tether(f"{LINES['sft']} {ALWAYS} --model {tiny} --out first") == 0
    assert tether(f"{command} first/model") == 0
    rows = read_rows(here / "g.jsonl")
    assert rows


def test_a_reward_models_adapter_scores_in_a_run(here, tiny):
    assert tether(f"{LINES['reward']} {ALWAYS} --model {tiny} --out rm") == 0
    assert tether(f"{LINES['grpo']} {ALWAYS} --reward rm/model --model {tiny} --out out") == 0
    assert any(name.startswith("rewards/") for name in read_metrics(here / "out")[-1])
