"""Any input gives an exit code and one line, never a traceback, and a complete run or none.

``fuzz.py`` draws the input. All of it runs as it does for a user, on a very small model, except that there is no
network and that the machine's speed is measured once. ``python -m tests.fuzz`` draws more and new examples.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import fuzz
from commandline import contents, read_rows, tether, workspace
from tether.data.checks import DataReport, keep_apart
from tether.data.fingerprint import fingerprint
from tether.data.records import load_demonstrations, load_pairs, load_prompts
from tether.errors import DataError
from tether.models.adapters import WEIGHTS
from tether.runtime.checkpoint import Checkpoints, Kept
from tether.untrusted import LONGEST_LINE, one_line
from tiny import byte_tokenizer

EXAMPLES = os.environ.get("TETHER_FUZZ_EXAMPLES")
CONTEXT = 48


def drawn(share: float) -> settings:
    """Settings for a ``share`` of the examples."""
    return settings(
        max_examples=round(share * int(EXAMPLES or 600)),
        derandomize=EXAMPLES is None,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(template=True)


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory, tokenizer):
    """The folder that all examples run in: data, a reward function and a model."""
    folder = tmp_path_factory.mktemp("fuzz")
    workspace(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, max_position_embeddings=CONTEXT, initializer_range=0.3,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "m")
    tokenizer.save_pretrained(folder / "m")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("sys.dont_write_bytecode", True)
        yield folder


def run(here: Path, *arguments: str) -> int:
    """The exit code of a command, whose complaint is one line, and which leaves what was there as it was."""
    before = contents(here)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        code = tether("", *arguments)
    printed = said.getvalue()
    assert code in (0, 2, 3, 75)
    assert "Traceback" not in printed
    if code:
        complaint = printed.removesuffix("\n").split("\n")[-1]
        assert complaint.startswith(f"tether {arguments[0]}: "), printed
        assert complaint.isprintable()
        assert len(arguments[0]) + 9 < len(complaint) <= LONGEST_LINE
    if arguments[0] != "resume":  # which changes what was there
        after = contents(here)
        assert {name: after.get(name) for name in before} == before
    event(f"{arguments[0]} ends with {code}")
    return code


@contextlib.contextmanager
def tidied(here: Path) -> Iterator[set[Path]]:
    """What is in the folder; what comes to it in the block is removed."""
    known = set(here.iterdir())
    try:
        yield known
    finally:
        for new in set(here.iterdir()) - known:
            shutil.rmtree(new)


def require_whole(run: Path, code: int) -> None:
    """A run is complete up to the step it reached, and to its end if it succeeded."""
    assert yaml.safe_load((run / "config.yaml").read_text())["command"]
    assert not list(run.rglob(".*"))
    rows = read_rows(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    checkpoints = Checkpoints(run, byte_tokenizer(), Kept(last=1, best=None))
    paths = [path for *_, path in checkpoints.names()]
    for path in paths[-1:] if code == 0 else paths:
        checkpoints.verified(path)
    if code == 0:
        assert rows
        assert json.loads((run / "summary.json").read_text())
        assert any((run / "model" / name).exists() for name in ("model.safetensors", WEIGHTS))  # or an adapter's


def train(here: Path, *arguments: str) -> tuple[int, int | None]:
    """The exit codes of a training command and, where there is a run after it, of resuming that with good rewards."""
    with tidied(here) as known:
        code = run(here, *arguments)
        new = set(here.iterdir()) - known
        if not new:
            assert code != 0
            return code, None
        (left,) = new
        require_whole(left, code)
        fuzz.PLAN.clear()
        resumed = run(here, "resume", f"./{left.name}")
        require_whole(left, resumed)
        return code, resumed


@drawn(0.45)
@given(handed_in=fuzz.configurations())
@example(("sft", b"seed: 0x" + b"f" * 5000, ["--model=m", "--data=texts.jsonl", "--out=out"]))
@example(("sft", b"0x" + b"f" * 5000 + b": 1", []))
@example(("sft", b"seed: " + b"9" * 30, ["--model=m", "--data=texts.jsonl", "--out=out"]))
@example(("sft", b"command: 0x" + b"f" * 5000, []))
@example(("sft", b"seed: !!bool x", []))
@example(("sft", b"stop-after: 99999999999d", ["--model=m", "--data=texts.jsonl", "--epochs=1", "--out=out"]))
@example(("sft", b"", ["--model=m", "--data=texts.jsonl", "--out=a\0b"]))
@example(("sft", b"", ["--model=m", "--data=texts.jsonl", "--out=\ud800"]))
@example(("sft", b"", ["--model=m", f"--data={'x' * 300}", "--out=out"]))
@example(("grpo", b"", ["--model=m", "--prompts=p.jsonl", f"--reward={'x' * 300}", "--max-new-tokens=4", "--out=out"]))
@example(("grpo", b"", ["--model=m", "--prompts=p.jsonl", f"--reward={'x' * 300}.py:fn", "--out=out"]))
@example(("sft", b"seed: 1" + b":1" * 400 + b".1", []))
def test_configuration_files(here, handed_in):
    command, file, flags = handed_in
    (here / "c.yaml").write_bytes(file)
    train(here, command, "--config", "c.yaml", *flags)


LOADERS = {"prompts": load_prompts, "pairs": load_pairs, "demonstrations": load_demonstrations}


@drawn(0.4)
@given(handed_in=fuzz.data())
def test_rows_become_records_that_fit_or_a_complaint(here, tokenizer, handed_in):
    kind, training, held_out, (on_bad_rows, overlong) = handed_in
    report, loaded, complaint = DataReport(), [], "none"
    more = {"max_new_tokens": 4} if kind == "prompts" else {}
    (here / "rows.jsonl").write_bytes(training)
    (here / "held.jsonl").write_bytes(held_out)
    try:
        for name in ("rows.jsonl", "held.jsonl"):
            given = {"overlong": overlong, "on_bad_rows": on_bad_rows, "report": report, **more}
            loaded.append(LOADERS[kind](name, tokenizer, context=CONTEXT, **given))
        loaded[0] = keep_apart(*loaded, report=report, on_bad_rows=on_bad_rows)
    except DataError as error:
        complaint = one_line(str(error))
    event(f"{kind} complaint" if complaint != "none" else f"{kind} loaded")
    assert complaint
    for records in loaded:
        assert records
        assert fingerprint(records)
        for record in records:
            lengths = {name: len(ids) for name, ids in vars(record).items() if name.endswith("ids")}
            sides = [lengths.pop(name, 0) for name in ("chosen_ids", "rejected_ids")]
            assert sum(lengths.values()) + max(sides) <= CONTEXT
    json.dumps([report.as_dict(), report.skipped], ensure_ascii=False).encode()
    for source in report.sources:
        assert source.kept + len(source.skipped) <= source.rows
        assert one_line(str(source))


COMMANDS = {
    "prompts": [
        "grpo --model m --steps 2 --prompts-per-step 2 --group-size 2 --max-new-tokens 4 --reward exact_answer",
        "rejection-sampling --model m --group-size 2 --epochs 1 --max-new-tokens 4 --reward r.py:fn",
    ],
    "pairs": ["reward --model m --epochs 1 --batch-size 4"],
    "demonstrations": ["sft --model m --epochs 1 --batch-size 4"],
}


@drawn(0.05)
@given(handed_in=fuzz.data(), choice=st.integers(0, 1), held_out=st.booleans())
def test_rows_through_a_whole_command(here, handed_in, choice, held_out):
    kind, training, other, (on_bad_rows, overlong) = handed_in
    (here / "rows.jsonl").write_bytes(training)
    (here / "held.jsonl").write_bytes(other)
    option = "data" if kind == "demonstrations" else kind
    line = f"{COMMANDS[kind][choice % len(COMMANDS[kind])]} --{option} rows.jsonl --out out"
    line += f" --eval-{option} held.jsonl" if held_out else ""
    train(here, *f"{line} --on-bad-rows {on_bad_rows} --overlong {overlong}".split())


GRPO = "grpo --steps 3 --prompts-per-step 2 --group-size 2"
RUNS = [
    GRPO,
    f"{GRPO} --minibatches 2 --advantage-baseline leave_one_out --kl-level sequence",
    "ppo --steps 3 --prompts-per-step 4 --minibatches 2 --kl-coef 0.1 --learning-rate 1e-3",
    "rejection-sampling --rounds 3 --group-size 2 --epochs 1 --batch-size 2 --save-every 1",
    "rejection-sampling --rounds 3 --group-size 3 --top-k 2 --keep overall --epochs 1",
]


@drawn(0.1)
@given(
    line=st.sampled_from(RUNS),
    weight=st.sampled_from(["", "", "=1e300", "=0", "=-1e308"]),
    more=st.sampled_from(["", "", "--reward length:3", "--save-every 1", "--reward repetition=1e308"]),
    good=st.integers(0, 2),
    plan=st.lists(fuzz.ACTS, min_size=1, max_size=2),
)
@example(GRPO, "", "", 1, [fuzz.never_ends])
@example(GRPO, "", "", 1, [fuzz.each([10**400])])
@example(GRPO, "", "", 1, [fuzz.each_token([1e308], 0)])
@example(GRPO, "=1e300", "", 1, [fuzz.each_token([1e20, -1e20], 0)])
@example(GRPO, "", "", 1, [fuzz.each([fuzz.Hostile()])])
@example(GRPO, "", "", 1, [fuzz.raises(fuzz.SpeechlessError())])
def test_whatever_a_reward_function_does(here, line, weight, more, good, plan):
    fuzz.PLAN.clear()
    fuzz.PLAN.update(enumerate([fuzz.each([1.0])] * good + plan))
    fixed = "--model m --prompts p.jsonl --max-new-tokens 4 --quiet --out out --reward fuzz:reward"
    code, resumed = train(here, *f"{line} {fixed}{weight} {more}".split())
    if code == 2 and resumed is not None and "e3" not in f"{weight}{more}":
        assert resumed == 0, "a run whose reward failed resumes once the reward is repaired"
