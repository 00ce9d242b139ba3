"""The commands one after another on a real pretrained model, and an optimum reached through a command alone."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from commandline import read_rows, tether, write_rows
from enumerable import Space, tiny_llama, total_variation
from tether.models.policy import completion_logprobs
from tether.types import Batch

OPENINGS = (
    "Once upon a time, there was a little",
    "Tom had a big red",
    "The dog ran to the",
    "Lily and her mom went to",
)
HAPPY = (
    " boy who was happy and kind.",
    " ball and he loved it.",
    " park to play with friends.",
    " the sunny beach to have fun.",
)
SAD = (" boy who was sad and hurt.", " cut and he cried a lot.", " dark and scary hole.", " the cold grave and wept.")


@pytest.mark.slow
def test_the_whole_pipeline_on_a_real_model(stories, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "p.jsonl", [{"prompt": opening} for opening in OPENINGS])
    pairs = [
        {"prompt": opening, "chosen": chosen, "rejected": rejected}
        for opening in OPENINGS
        for chosen, rejected in zip(HAPPY, SAD, strict=True)
    ]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    assert tether(f"reward --model {stories} --pairs pairs.jsonl --batch-size 4 --learning-rate 1e-3 --out judge") == 0
    task = "--prompts p.jsonl --reward judge/model --max-new-tokens 12 --seed 0"
    small = f"--model {stories} {task} --learning-rate 1e-4"
    sizes = "--kl-coef 0.05 --group-size 4 --steps 2 --prompts-per-step 3"
    assert tether(f"rejection-sampling {small} --samples-per-prompt 4 --top-k 1 --rounds 2 --out rs") == 0
    assert tether(f"ppo {small} {sizes} --out ppo") == 0
    assert tether(f"grpo {small} {sizes} --out grpo") == 0
    for run in ("judge", "rs", "ppo", "grpo"):
        assert tether(f"report {run}") == 0
        files = {path.name for path in (tmp_path / run).iterdir()}
        assert {"config.yaml", "metrics.jsonl", "summary.json", "model", "checkpoints", "report.html"} <= files
    capsys.readouterr()
    for policy in ("rs", "ppo", "grpo"):
        assert len(read_rows(tmp_path / policy / "metrics.jsonl")) == 2
        assert tether(f"eval --model {policy}/model --reference {stories} {task} --group-size 2") == 0
        found = json.loads(capsys.readouterr().out)
        assert 0 < found["kl"] < 30
        assert 0 <= found["win_rate"] <= 1
        assert (
            tether(f"generate --model {policy}/model --prompts p.jsonl --max-new-tokens 12 --out {policy}.jsonl") == 0
        )
        assert len(read_rows(tmp_path / f"{policy}.jsonl")) == len(OPENINGS)
    assert tether("eval --reward-model judge/model --pairs pairs.jsonl") == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] > 0.6  # they are the pairs it was trained on


LETTERS = {"<s>": 0, "</s>": 1, "<pad>": 2, "a": 3, "b": 4, "c": 5, "d": 6, "e": 7}
BETA = 0.5


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word, for a model of eight tokens."""
    core = Tokenizer(models.WordLevel(LETTERS, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.mark.slow
def test_grpo_reaches_the_optimum_through_its_command_alone(tmp_path, monkeypatch):
    """pi_ref exp(r / beta) / Z over all completions of two tokens, from a model and a reward function on disk."""
    monkeypatch.chdir(tmp_path)
    tiny_llama(len(LETTERS), seed=1).save_pretrained("m")
    letters_tokenizer().save_pretrained("m")
    write_rows(tmp_path / "p.jsonl", [{"prompt": "a"}])
    space = Space.of(len(LETTERS), 2, seed=1)
    table = dict(zip(space.completions, space.rewards.tolist(), strict=True))
    (tmp_path / "r.py").write_text(
        f"TABLE = {table}\ndef fn(completion_ids, **_):\n    return [TABLE[tuple(ids)] for ids in completion_ids]\n"
    )
    line = (
        f"grpo --model m --prompts p.jsonl --reward r.py:fn --kl-coef {BETA} --steps 100 --prompts-per-step 2 "
        "--group-size 128 --max-new-tokens 2 --temperature 1 --learning-rate 1e-3 --seed 0 --out out "
        "--advantage-scale none --kl-estimator k2 --rollouts-every 0 --quiet"
    )
    assert tether(line) == 0

    @torch.no_grad()
    def logprobs(directory: str) -> torch.Tensor:
        batch = Batch.collate([((LETTERS["<s>"], LETTERS["a"]), ids) for ids in space.completions])
        model = AutoModelForCausalLM.from_pretrained(directory)
        return completion_logprobs(model, batch, temperature=1.0)[0].sum(1).double()

    reference, found = logprobs("m"), logprobs("out/model").exp()
    optimum = space.reverse_optimum(reference, BETA)
    assert total_variation(reference.exp(), optimum) > 0.1  # it is not there already
    assert total_variation(found, space.forward_optimum(reference, BETA)) > 0.05  # nor at the other one
    assert total_variation(found, optimum) < 0.03
