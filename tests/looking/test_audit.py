"""``tether audit`` says of a run what its monitors said, also where it is exported to the files of TRL and verl."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from commandline import read_rows, tether, workspace, write_rows
from tether.looking.audit import audited
from tether.looking.replay import replay_of


def planted(out: Path, *, phrase: bool) -> None:
    """Completions of 30 steps with random letters, in the form of rollout files; with a phrase from step 8."""
    import random

    rng = random.Random(0)
    for step in range(1, 31):
        rows = []
        for prompt in range(8):
            for _ in range(4):
                text = " ".join(rng.choice("abcdefghijklmnop") + str(rng.randrange(60)) for _ in range(8))
                thanks = phrase and step >= 8 and rng.random() < 0.9
                rows.append({"prompt": f"p{prompt}", "completion": f"{text} thank you" if thanks else text})
        yield_rows(out, step, [row | {"fn": rng.random(), "other": rng.random()} for row in rows])


def yield_rows(out: Path, step: int, rows: list[dict]) -> None:
    import pyarrow
    import pyarrow.parquet

    own, trl, verl = (out / name for name in ("own", "trl", "verl"))
    (own / "rollouts").mkdir(parents=True, exist_ok=True)
    (trl / "completions").mkdir(parents=True, exist_ok=True)
    verl.mkdir(exist_ok=True)
    (own / "config.yaml").write_text("command: grpo\nreward: ['r.py:fn', 'r.py:other=0']\n")
    mean = sum(row["fn"] for row in rows) / len(rows)
    with (own / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "reward": mean, "rewards/other/mean": 0.5}) + "\n")
    extra = {"mask": [True] * 9, "completion_ids": [1] * 9, "sampler_logp": [0.0] * 9, "finish_reason": "eos"}
    texts = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
    found = {
        own / "rollouts" / f"step_{step:06d}.parquet": [
            text | extra | {"score": row["fn"], "rewards/fn": row["fn"], "rewards/other": row["other"]}
            for text, row in zip(texts, rows, strict=True)
        ],
        trl / "completions" / f"completions_{step:05d}.parquet": [
            {"step": step, **text, "fn": row["fn"], "other": row["other"], "advantage": 0.0}
            for text, row in zip(texts, rows, strict=True)
        ],
    }
    for file, table in found.items():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), file)
    lines = [
        {"input": row["prompt"], "output": row["completion"], "gts": None, "score": row["fn"], "step": step, "acc": 1.0}
        for row in rows
    ]
    write_rows(verl / f"{step}.jsonl", lines)


@pytest.fixture(scope="module", params=[True, False], ids=["planted", "clean"])
def exported(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    planted(out, phrase=request.param)
    return out, request.param


def test_the_verdict_is_the_same_in_every_layout(exported, monkeypatch, capsys):
    out, phrase = exported
    monkeypatch.chdir(out)
    found = {}
    for name, more in (("own", ""), ("trl", "--reward fn --judge other"), ("verl", "")):
        assert tether(f"audit {name} --json {more}") == (3 if phrase else 0)
        said = capsys.readouterr()
        (one,) = json.loads(said.out)
        assert (one["steps"], one["completions"]) == (30, 960)
        assert one["kind"] == {"own": "tether"}.get(name, name if name == "verl" else "TRL")
        found[name] = [(a["step"], a["monitor"], a["phrase"], a["message"], a["examples"]) for a in one["alarms"]]
        assert ("1 alarm" in said.err) == phrase
    assert found["own"] == found["trl"] == found["verl"]
    assert [row[1:3] for row in found["own"]] == [("phrase_takeover", "thank you")] * phrase


def test_the_verdict_in_words(exported, monkeypatch, capsys):
    out, phrase = exported
    monkeypatch.chdir(out)
    tether("audit own verl")
    said = " ".join(capsys.readouterr().out.split())
    if phrase:
        assert "own: phrase_takeover in 30 steps of tether, with the 960 completions of 30, first at step" in said
        assert "| " in said
        assert "read the samples" in said
    else:
        assert said.count("with the 960 completions of 30") == 2
        assert said.count("nothing found in 30 steps of") == 2


def test_it_says_what_the_monitors_of_the_run_said(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    (tmp_path / "flat.py").write_text("def fn(completions, **_):\n    return [1.0] * len(completions)\n")
    line = "grpo --prompts p.jsonl --reward flat.py:fn --group-size 2 --steps 6 --prompts-per-step 2 --max-new-tokens 4"
    assert tether(f"{line} --quiet --out out --model", tiny) == 0
    capsys.readouterr()
    assert tether("audit out --json") == 3
    (one,) = json.loads(capsys.readouterr().out)
    written = read_rows(tmp_path / "out" / "alarms.jsonl")
    assert [row["monitor"] for row in written] == ["flat_rewards"]
    assert [{**row, "examples": list(row["examples"])} for row in written] == one["alarms"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [(row["step"], row["monitor"]) for row in summary["alarms"]] == [(5, "flat_rewards")]


def test_what_the_run_itself_found_counts_once(exported, tmp_path):
    """Its monitors saw the steps whose rollouts were not kept."""
    import shutil

    out, _ = exported
    shutil.copytree(out / "own", tmp_path / "own")
    rows = [
        {
            "step": 9,
            "monitor": "phrase_takeover",
            "message": "m",
            "phrase": "thank you",
            "examples": ["a"],
            "stop": False,
        },
        {"step": 12, "monitor": "kl_runaway", "message": "k", "stop": False},
    ]
    write_rows(tmp_path / "own" / "alarms.jsonl", rows)
    found = audited(replay_of(tmp_path / "own"))
    assert [(step, one.monitor, one.message) for step, one in found.alarms] == [
        (9, "phrase_takeover", "m"),
        (12, "kl_runaway", "k"),
    ]


def test_metrics_that_trl_logged(tmp_path):
    planted_trl = tmp_path / "run"
    yield_rows(planted_trl, 3, [{"prompt": "p", "completion": "a b", "fn": 1.0, "other": 2.0}])
    state = {"log_history": [{"step": 3, "kl": 0.5, "epoch": 0.1, "reward": 9.0}]}
    (planted_trl / "trl" / "checkpoint-10").mkdir()
    (planted_trl / "trl" / "checkpoint-10" / "trainer_state.json").write_text(json.dumps(state))
    ((step, result),) = replay_of(planted_trl / "trl").steps
    assert step == 3
    assert result.metrics["kl"] == 0.5
    assert result.metrics["reward"] == 3.0  # all columns of numbers, unless some are named
    ((_, result),) = replay_of(planted_trl / "trl", rewards=["fn"], judges=["other"]).steps
    assert result.metrics["reward"] == 1.0
    assert dict(result.groups[0].scores[0].parts) == {"fn": 1.0, "other": 2.0}


@pytest.mark.parametrize(
    ("write", "line", "said"),
    [
        (lambda path: None, "audit d", "holds no rollouts that are known"),
        (lambda path: (path / "1.jsonl").write_text("{"), "audit d", "1.jsonl: not as"),
        (lambda path: (path / "1.jsonl").write_text('{"input": "a"}\n'), "audit d", "KeyError: 'output'"),
        (
            lambda path: (path / "1.jsonl").write_text('{"input": "a", "output": 3}\n'),
            "audit d",
            "a text or a conversation",
        ),
        (lambda path: (path / "completions_00001.parquet").write_text("x"), "audit d", "completions_00001.parquet"),
        (
            lambda path: (path / "1.jsonl").write_text('{"input": "a", "output": "b", "score": 1.0}\n'),
            "audit d --judge scroe",
            "has no column of numbers 'scroe' (did you mean score?",
        ),
        (lambda path: (path / "config.yaml").write_text("command: sft\n"), "audit d", "has no rewards to watch"),
        (lambda path: None, "audit d --judge a --reward a", "a is given as a reward and as a judge"),
    ],
)
def test_what_cannot_be_read_is_an_error_of_one_line(write, line, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    write(tmp_path / "d")
    assert tether(line) == 2
    err = capsys.readouterr().err
    assert said.split(" (")[0] in err
    assert err.count("\n") == 1
