"""What ``tether doctor`` says of a machine, in words and with what to do."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest
import torch

from commandline import tether, workspace
from tether import doctor
from tether.doctor import EXTRAS, check_engine, describe, extras, in_flops, speeds
from tether.errors import ModelError
from tether.training.fit import CHANGES

ROOT = Path(__file__).resolve().parents[1]
G = 1e9


@pytest.mark.parametrize(
    ("rounded", "said"),
    [
        (0.4 * G, "not accelerated here: --matmul-dtype auto keeps float32"),
        (120 * G, "120 GFLOP/s, 1.2 times float32: too little, so --matmul-dtype auto keeps float32"),
        (150 * G, "150 GFLOP/s, 1.5 times float32: --matmul-dtype auto uses it"),
        (2000 * G, "2.0 TFLOP/s, 20.0 times float32: --matmul-dtype auto uses it"),
    ],
)
def test_bfloat16_in_words(rounded, said):
    assert speeds([100 * G], rounded) == {
        "float32": "100 GFLOP/s in large matrix products",
        "bfloat16": said,
    }


def test_readings_that_vary_explain_an_mfu_above_1():
    assert "load" not in speeds([100 * G, 71 * G], G)
    load = speeds([100 * G, 40 * G], G)["load"]
    assert load.startswith("float32 readings vary from 40 GFLOP/s to 100 GFLOP/s, so other programs")
    assert "mfu" in load
    assert "exceed 1" in load


def test_rates_have_a_unit_that_fits():
    assert [in_flops(rate) for rate in (2.4e9, 999e9, 1e12, 6.5e14)] == [
        "2 GFLOP/s",
        "999 GFLOP/s",
        "1.0 TFLOP/s",
        "650.0 TFLOP/s",
    ]


def test_what_is_missing_is_named_with_the_command_that_installs_it():
    assert extras({"hub": True, "report": True}) == "hub, report installed"
    assert extras({"hub": True, "report": False, "sentiment": False}) == (
        "hub installed; report, sentiment missing: pip install 'tether-rlhf[report,sentiment]'"
    )
    assert extras({"hub": False}) == "hub missing: pip install 'tether-rlhf[hub]'"


def test_every_extra_is_looked_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert EXTRAS.keys() == project["optional-dependencies"].keys() - {"dev", "quickstart", "trackers"}


def test_a_gpu_that_torch_does_not_find(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert describe(torch.device("cpu")).startswith("CPU, ")
    assert "nvidia-smi" not in describe(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "built for CUDA 12.8 and finds no GPU: see what nvidia-smi says" in describe(torch.device("cpu"))


def test_an_engine_that_disagrees_is_an_error_on_a_cpu(monkeypatch):
    class Other(doctor.NaiveGenerator):
        def generate(self, requests, *, sampling):
            return super().generate(list(requests)[:1], sampling=doctor.Sampling(max_new_tokens=3))

    monkeypatch.setattr(doctor, "NaiveGenerator", Other)
    with pytest.raises(ModelError, match="please report it"):
        check_engine(torch.device("cpu"))


def test_the_command_fits_80_columns(capsys):
    assert tether("doctor") == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "rollout engine  works: it samples what generation without a cache samples" in shown
    assert "GFLOP/s in large matrix products" in shown or "TFLOP/s" in shown
    assert " 0 GFLOP/s" not in shown


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    return tmp_path


METHODS = ("sft", "reward", "dpo", "rejection-sampling", "ppo", "grpo")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_each_method_fits_here(method, tiny, capsys):
    assert tether(f"doctor --method {method} --model {tiny}") == 0
    shown = capsys.readouterr().out
    assert "  at the peak\nfits here: " in shown
    assert "s or more (" in shown
    assert "in the update: activations " in shown


def test_a_run_that_does_not_fit_has_changes_each_smaller_than_the_one_before(tiny, capsys):
    line = f"doctor --method grpo --model {tiny} --memory 0.006 --prompt-tokens 60 --max-new-tokens 60"
    assert tether(line) == 0
    shown = capsys.readouterr().out
    assert "does not fit a GPU of 0.006 GiB" in shown
    assert "a step takes" not in shown  # nothing is known of that GPU's speed
    lines = shown[shown.index("to make it smaller") :].splitlines()[1:]
    assert lines[0].split()[1:] == ["--micro-batch-tokens", "4096"]
    peaks = [float(line.split()[0]) for line in lines[:-1]]
    assert peaks == sorted(peaks, reverse=True)
    assert "--checkpoint-activations" in shown
    assert lines[-1].endswith(" alone, which is enough")
    alone = lines[-1].split(" with ")[1].removesuffix(" alone, which is enough")
    assert tether(f"{line} {alone}") == 0
    assert "\nfits a GPU of 0.006 GiB: " in capsys.readouterr().out


def test_what_is_too_small_for_any_change(tiny, capsys):
    assert tether(f"doctor --method sft --model {tiny} --memory 0.0001") == 0
    assert "that is not enough: take a smaller model" in capsys.readouterr().out


def test_the_changes_are_options_of_the_command(tiny, capsys):
    changes = " ".join(" ".join(change) for change in CHANGES if change[0] not in ("--cache-gib", "--quantise"))
    for method in METHODS:
        assert tether(f"doctor --method {method} --model {tiny} {changes}") == 0
    assert "adapter" in capsys.readouterr().out


def test_the_data_that_is_given_is_measured(tiny, here, capsys):
    def activations(line):
        assert tether(f"doctor --method {line} --model {tiny}") == 0
        return capsys.readouterr().out

    assert activations("sft --data texts.jsonl") != activations("sft --completion-tokens 1000 --prompt-tokens 1000")
    assert "scoring" not in activations("grpo --prompts p.jsonl --reward length:4 --max-new-tokens 8")
    assert tether(f"reward --pairs pairs.jsonl --epochs 1 --quiet --model {tiny} --out judge") == 0
    shown = activations("grpo --prompts p.jsonl --reward judge/model --eval-prompts held_prompts.jsonl")
    assert "reward models" in shown
    assert "in the scoring" in shown
    assert "fits here" in activations("dpo --pairs pairs.jsonl")


def test_a_model_without_weights(tiny, here, capfd):
    """Its configuration is enough, with a tokenizer where data is to be measured."""
    shutil.copytree(tiny, "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert tether("doctor --method dpo --pairs pairs.jsonl --model bare") == 0
    for file in Path("bare").glob("tokenizer*"):
        file.unlink()
    assert tether("doctor --method dpo --model bare") == 0
    capfd.readouterr()
    assert tether("doctor --method dpo --pairs pairs.jsonl --model bare") == 2
    assert "bare: the tokenizer cannot be loaded" in (said := capfd.readouterr().err)
    assert "or lengths in place of the data: --prompt-tokens and --completion-tokens" in said


def test_the_options_of_a_run_that_exists(tiny, here, capsys):
    assert tether(f"sft --data texts.jsonl --model {tiny} --out out --lora-rank 3") == 0
    assert tether("doctor --method sft --config out/config.yaml") == 0
    assert "adapter" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--model base", "--model is an option of a run; give its command too, as --method grpo"),
        ("--method grpo", "missing: --model (see 'tether grpo --help')"),
        ("--method grpo --model nowhere", "nowhere: no such model"),
        ("--method grpo --model base --group-sise 3", "unknown option --group-sise; did you mean --group-size?"),
        ("--method grpo --model base --memory 0", "memory must be positive"),
        ("--method grpo --model base --prompt-tokens 0", "prompt_tokens must be at least 1"),
        ("--method trpo", "--method"),
        ("--method sft --model base --data nowhere.jsonl", "nowhere.jsonl"),
        ("--method grpo --model base --reward nowhere/judge.x", "nowhere/judge.x"),
    ],
)
def test_wrong_options(line, says, here, capfd):
    assert tether(f"doctor {line}") == 2
    said = capfd.readouterr().err
    assert says in said
    assert said.count("\n") == 1
