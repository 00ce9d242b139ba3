"""What ``tether doctor`` says of a machine, in words and with what to do."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch

from commandline import tether
from tether import doctor
from tether.doctor import EXTRAS, check_engine, describe, extras, in_flops, speeds
from tether.errors import ModelError

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
