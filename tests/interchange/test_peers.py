"""What tether writes is read by TRL, RewardBench and transformers' pipelines, and the reverse, in their environment.

``python -m benchmarks.peers setup`` makes it; without it these tests are skipped.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
from pathlib import Path

import pytest
import torch

from commandline import read_rows, tether, write_rows
from tether.looking.best_of_n import Item, Scored, ties_score
from tether.looking.replay import replay_of
from tether.models.loading import load_policy, load_tokenizer
from tether.models.reward import load_reward_model, score_sequences
from tiny import make_model

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".peers" / "trl-1.16" / "bin" / "python"

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="needs the peers' environment: python -m benchmarks.peers setup"
)

PAIRS = [{"prompt": f"Q{i}", "chosen": f" yes {i}", "rejected": f" no {i}, not at all"} for i in range(12)]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "pairs.jsonl", PAIRS)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": row["prompt"]} for row in PAIRS[:4]])
    return tmp_path


def peer(script: str, *arguments: object):
    """What a script prints last, as JSON; it is run by the peers' Python."""
    line = [str(PYTHON), "-W", "ignore", "-c", script, *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture
def judge(tiny):
    """A reward model of tether, and the texts that it is compared on."""
    assert tether(f"reward --model {tiny} --pairs pairs.jsonl --test-share 0 --epochs 1 --quiet --out rm") == 0
    return [row["prompt"] + row[side] + "</s>" for row in PAIRS[:5] for side in ("chosen", "rejected")]


def own_scores(directory, texts):
    model, _ = load_reward_model(directory)
    tokenizer = load_tokenizer(directory)
    return score_sequences(model, [((), tokenizer(text)["input_ids"]) for text in texts])


PIPELINE = """
import json, sys
from transformers import AutoTokenizer, pipeline
name, texts = sys.argv[1], json.loads(sys.argv[2])
judge = pipeline("text-classification", model=name, tokenizer=AutoTokenizer.from_pretrained(name))
found = judge(texts, function_to_apply="none", padding=True, truncation=True, max_length=120, batch_size=4)
print(json.dumps([one["score"] for one in found]))
"""


def test_a_reward_model_scores_the_same_in_a_pipeline(judge):
    found = torch.tensor(peer(PIPELINE, "rm/model", json.dumps(judge)))
    torch.testing.assert_close(found, own_scores("rm/model", judge), rtol=0, atol=1e-4)


REWARDBENCH = """
import importlib.util, json, sys, types
from pathlib import Path
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

def module(path, **others):  # alone: the package imports what other models need
    for name, attributes in others.items():
        sys.modules[name.replace("_", ".")] = types.SimpleNamespace(**attributes)
    root = Path(importlib.util.find_spec("rewardbench").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("part", root / path)
    part = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(part)
    return part
"""
IN_REWARDBENCH = (
    REWARDBENCH
    + """
transformers.BatchEncoding.to = lambda batch, device: batch  # its device is fixed, to one that is not here
name, texts = sys.argv[1], json.loads(sys.argv[2])
judge = AutoModelForSequenceClassification.from_pretrained(name)
build = module("models/pipeline.py").RewardBenchPipeline
pipe = build("text-classification", judge, AutoTokenizer.from_pretrained(name))
scores = pipe(texts, batch_size=8, truncation=True, padding=True, max_length=120, function_to_apply="none")
print(json.dumps(scores.flatten().tolist()))
"""
)


def test_a_reward_model_scores_the_same_in_rewardbench(judge):
    found = torch.tensor(peer(IN_REWARDBENCH, "rm/model", json.dumps(judge)))
    torch.testing.assert_close(found, own_scores("rm/model", judge), rtol=0, atol=1e-4)


TIES_IN_REWARDBENCH = (
    REWARDBENCH
    + """
utils = module("utils.py", fastchat_conversation={"Conversation": None}, rewardbench_models={"REWARD_MODEL_CONFIG": {}})
print(json.dumps([float(utils.process_single_model(rows)[1]) for rows in json.loads(sys.argv[1])]))
"""
)


def test_the_score_of_ties_is_rewardbenchs():
    """Random scores, with equal ones, with single right answers and with rows that lack the other kind."""
    draw = random.Random(0)
    theirs, ours = [], []
    for _ in range(60):
        items = []
        for number in range(draw.randint(1, 6)):
            for kind in draw.choice([("ref", "tied"), ("ref", "tied"), ("ref",), ("tied",)]):
                right = 1 if kind == "ref" else draw.choice([1, 2, 4])
                scores = [draw.choice([0.5, draw.gauss(2, 1)]) for _ in range(right)]
                scores += [draw.choice([0.5, draw.gauss(0, 1)]) for _ in range(3)]
                items.append((f"{kind}:{number}", right, scores))
        theirs.append([{"id": i, "scores": scores, "num_correct": right} for i, right, scores in items])
        ours.append(
            [
                Scored(
                    item=Item(where="", prompt="", chosen=["a"] * right, rejected=["b"] * 3, subset="Ties", id=i),
                    chosen=scores[:right],
                    rejected=scores[right:],
                )
                for i, right, scores in items
            ]
        )
    expected = peer(TIES_IN_REWARDBENCH, json.dumps(theirs))
    found = [ties_score(rows)["score"] for rows in ours]
    both = [(a, b) for a, b in zip(found, expected, strict=True) if math.isfinite(b)]  # NaN where no row is tied
    assert len(set(both)) > 30
    for one, other in both:
        assert one == pytest.approx(other, abs=1e-9)


EVALUATED = """
import json, sys
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer
model, pairs, out, steps = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
rows = Dataset.from_list([json.loads(line) for line in open(pairs)])
tokenizer = AutoTokenizer.from_pretrained(model)
judge = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
judge.config.pad_token_id = tokenizer.pad_token_id
config = RewardConfig(output_dir=out, report_to=[], max_steps=max(steps, 1), per_device_train_batch_size=4,
    per_device_eval_batch_size=4, use_cpu=True, bf16=False, fp16=False, save_strategy="no", disable_tqdm=True,
    gradient_checkpointing=False, learning_rate=1e-3 if steps else 0.0)
trainer = RewardTrainer(model=judge, args=config, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
if steps:
    trainer.train()
    trainer.save_model(out)
print(json.dumps(trainer.evaluate()))
"""


def test_a_reward_model_has_the_same_accuracy_and_loss_in_trls_trainer(judge):
    """TRL's rendering of a pair of plain text is the prompt, the side and the EOS, as here."""
    theirs = peer(EVALUATED, "rm/model", "pairs.jsonl", "out", 0)
    raw = own_scores(
        "rm/model", [row["prompt"] + row[side] + "</s>" for row in PAIRS for side in ("chosen", "rejected")]
    )
    margins = raw.view(-1, 2) @ torch.tensor([1.0, -1.0])
    assert theirs["eval_accuracy"] == pytest.approx(float((margins > 0).float().mean()), abs=1e-6)
    loss = float(-torch.nn.functional.logsigmoid(margins).mean())
    assert theirs["eval_loss"] == pytest.approx(loss, abs=1e-3)


def test_a_reward_model_that_trl_trained_loads_here_with_its_scores(tiny, judge):
    peer(EVALUATED, tiny, "pairs.jsonl", "theirs", 2)
    found = torch.tensor(peer(PIPELINE, "theirs", json.dumps(judge)))
    torch.testing.assert_close(own_scores("theirs", judge), found, rtol=0, atol=1e-4)


GREEDY = """
import json, sys
from transformers import AutoTokenizer, pipeline
name, prompts = sys.argv[1], json.loads(sys.argv[2])
writer = pipeline("text-generation", model=name, tokenizer=AutoTokenizer.from_pretrained(name))
print(json.dumps([writer(one, max_new_tokens=8, do_sample=False, return_full_text=False)[0]["generated_text"]
    for one in prompts]))
"""


def test_a_policy_writes_the_same_in_a_pipeline(here, tiny):
    assert tether(f"dpo --model {tiny} --pairs pairs.jsonl --batch-size 4 --learning-rate 1e-3 --quiet --out out") == 0
    asked = "--prompts prompts.jsonl --temperature 0 --max-new-tokens 8 --out g.jsonl"
    assert tether(f"generate --model out/model {asked}") == 0
    own = [row["completion"] for row in read_rows(here / "g.jsonl")]
    assert peer(GREEDY, "out/model", json.dumps([row["prompt"] for row in PAIRS[:4]])) == own


DPO = """
import json, sys
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
model, pairs, out = sys.argv[1:4]
rows = Dataset.from_list([json.loads(line) for line in open(pairs)])
tokenizer = AutoTokenizer.from_pretrained(model)
config = DPOConfig(output_dir=out, report_to=[], max_steps=1, per_device_train_batch_size=12, use_cpu=True, bf16=False,
    fp16=False, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, learning_rate=1e-3,
    lr_scheduler_type="constant", beta=0.1, logging_steps=1, max_grad_norm=1e9)
trainer = DPOTrainer(model=AutoModelForCausalLM.from_pretrained(model), args=config, train_dataset=rows,
    processing_class=tokenizer)
trainer.train()
trainer.save_model(out)
first = trainer.state.log_history[0]
print(json.dumps({key: first[key] for key in ("loss", "logps/chosen", "logps/rejected")}))
"""


def test_our_pairs_train_trls_dpo_which_begins_with_our_log_probs_and_loads_here(here, tiny):
    theirs = peer(DPO, tiny, "pairs.jsonl", "theirs")
    line = f"dpo --model {tiny} --pairs pairs.jsonl --eval-share 0 --batch-size 12 --quiet --matmul-dtype float32"
    assert tether(f"{line} --out out") == 0
    ours = read_rows(here / "out" / "metrics.jsonl")[0]
    assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-4)
    for side in ("chosen", "rejected"):
        assert theirs[f"logps/{side}"] == pytest.approx(ours[f"logps/{side}"], rel=1e-3)
    model, _ = load_policy("theirs")
    assert model.config.model_type == "llama"


GRPO = """
import json, sys
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from module import letters
model, prompts = sys.argv[1:3]
rows = Dataset.from_list([json.loads(line) for line in open(prompts)])
config = GRPOConfig(output_dir="grpo", report_to=[], max_steps=2, per_device_train_batch_size=4, num_generations=2,
    max_completion_length=4, use_cpu=True, bf16=False, fp16=False, save_strategy="no", disable_tqdm=True,
    gradient_checkpointing=False, logging_steps=1)
trainer = GRPOTrainer(model=AutoModelForCausalLM.from_pretrained(model), reward_funcs=letters, args=config,
    train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(model))
trainer.train()
print(json.dumps([row["taken"] for row in trainer.state.log_history if "taken" in row]))
"""
MODULE = """
def letters(completions, trainer_state, log_metric, log_extra, **columns):
    log_metric("taken", trainer_state.global_step)
    log_extra("letters", [len(completion) for completion in completions])
    return [float(len(completion)) for completion in completions]
"""


def test_one_module_of_rewards_runs_in_both(here, tiny):
    (here / "module.py").write_text(MODULE)
    assert peer(GRPO, tiny, "prompts.jsonl") == [0, 1]
    steps = "--steps 2 --prompts-per-step 2 --group-size 2 --max-new-tokens 4"
    line = f"grpo --model {tiny} --prompts prompts.jsonl --reward module.py:letters {steps} --quiet --out out"
    assert tether(line) == 0
    assert [row["logged/taken"] for row in read_rows(here / "out" / "metrics.jsonl")] == [0, 1]


@pytest.fixture
def tiny(tmp_path):
    return make_model(tmp_path / "tiny")


LOGGED_BY_TRL = """
import json, sys
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
name, out = sys.argv[1:]

def length(completions, **_):
    return [float(len(one) % 5) for one in completions]

def other(completions, **_):
    return [1.0] * len(completions)

settings = GRPOConfig(
    output_dir=out, per_device_train_batch_size=4, num_generations=2, max_completion_length=6, max_steps=3,
    log_completions=True, logging_steps=1, save_steps=3, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
)
rows = Dataset.from_list([{"prompt": f"Q{i}"} for i in range(12)])
GRPOTrainer(model=name, reward_funcs=[length, other], args=settings, train_dataset=rows).train()
print(json.dumps("done"))
"""


def test_what_trl_logs_can_be_audited(tiny, here, capsys):
    assert peer(LOGGED_BY_TRL, tiny, "trl") == "done"
    assert tether("audit trl --json --reward length --judge other") in (0, 3)
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["steps"], found["completions"], found["judges"]) == ("TRL", 3, 12, ["other"])
    (first, *_) = replay_of(here / "trl", rewards=["length"], judges=["other"]).steps
    step, result = first
    assert step == 1
    assert {"grad_norm", "entropy", "completions/clipped_ratio", "reward"} <= result.metrics.keys()
    scores = [score for group in result.groups for score in group.scores]
    assert [score.parts["other"] for score in scores] == [1.0] * 4
    assert all(score.total == score.parts["length"] for score in scores)
    assert [len(group.scores) for group in result.groups] == [2, 2]
