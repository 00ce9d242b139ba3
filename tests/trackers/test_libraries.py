"""Each tracker with its own library, offline: what a run leaves there is read back by that library's means.

A library that is not installed skips its tests: ``pip install -e '.[trackers]'`` has all of them.
"""

from __future__ import annotations

import json
import sqlite3
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from commandline import read_rows, tether
from runs import LINES
from tether.monitor import flat_rewards
from tether.trackers import supervised
from tracked import dies_after

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own

STEPS = [1, 2, 3, 4]
CLOSED_PORT = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """A loaded machine takes its time."""
    monkeypatch.setattr(supervised, "PATIENCE", 300.0)
    monkeypatch.setattr(supervised, "PATIENCE_WHEN_STOPPED", 300.0)


def grpo(tiny, *more):
    return tether(f"{LINES['grpo']} --quiet --model {tiny} --out out", *more)


def died_and_resumed(tiny, tracker):
    """A run whose steps 3 and 4 the tracker might be given twice, because step 3 follows the last checkpoint."""
    dies_after(3, tiny, "--quiet", "--save-every", "2", "--track", tracker)
    assert tether("resume out") == 0


def column(work, name) -> list[float]:
    return [row[name] for row in read_rows(work / "out" / "metrics.jsonl")]


def raises_an_alarm(work, monkeypatch):
    """Rewards that are all equal do, after two steps."""
    monkeypatch.setattr(flat_rewards, "PATIENCE", 2)
    (work / "r.py").write_text("def fn(completions, **_):\n    return [1.0] * len(completions)\n")


# TensorBoard


@pytest.fixture
def board():
    """The events of ``out/tensorboard``, as TensorBoard's server reads them: all of them are tensors there."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_accumulator")

    def read():
        return accumulator.EventAccumulator("out/tensorboard", size_guidance={"tensors": 0}).Reload()

    return read


def scalars(events, tag) -> list[tuple[int, float]]:
    from tensorboard.util.tensor_util import make_ndarray

    return [(one.step, make_ndarray(one.tensor_proto).item()) for one in events.Tensors(tag)]


def texts(events, tag) -> list[tuple[int, str]]:
    return [(one.step, one.tensor_proto.string_val[0].decode()) for one in events.Tensors(f"{tag}/text_summary")]


def test_tensorboard_shows_the_run(work, tiny, board, monkeypatch):
    raises_an_alarm(work, monkeypatch)
    assert grpo(tiny, "--track", "tensorboard") == 0
    events = board()
    steps, values = zip(*scalars(events, "entropy"), strict=True)
    assert list(steps) == STEPS
    assert list(values) == pytest.approx(column(work, "entropy"))
    tags = set(events.Tags()["tensors"])
    assert {name for name in read_rows(work / "out" / "metrics.jsonl")[0] if name != "step"} <= tags
    assert scalars(events, "final/steps") == [(4, 4.0)]
    ((_, config),) = texts(events, "config")
    assert '"kl_coef": 0.04' in config
    assert [step for step, _ in texts(events, "samples")] == STEPS
    assert "| rewards/fn |" in texts(events, "samples")[0][1]
    assert "equal rewards" in texts(events, "alarms/flat_rewards")[0][1].replace("\\", "")
    assert '"steps": 4' in texts(events, "summary")[0][1]


def test_tensorboard_continues_from_the_checkpoint(work, tiny, board):
    died_and_resumed(tiny, "tensorboard")
    events = board()
    assert [step for step, _ in scalars(events, "reward")] == STEPS
    assert [value for _, value in scalars(events, "reward")] == pytest.approx(column(work, "reward"))
    assert [step for step, _ in texts(events, "samples")] == STEPS


def test_text_from_a_model_is_no_markup():
    from tether.trackers.tensorboard import markdown_table

    row = {"completion": "a|b\n<img src=x> [l](http://h) `c` \x1b[31m", "score": None}
    assert markdown_table([row]).splitlines()[2] == (
        r"| a\|b ↵ \<img src=x\> \[l\]\(http://h\) \`c\` \\u001b\[31m |  |"
    )


# Weights & Biases


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """W&B without an account, and without the settings of whoever runs the tests."""
    module = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    module.teardown()
    yield module
    module.teardown()


def records(file: Path) -> Iterator:
    """The records of a ``.wandb`` file: a LevelDB log of protocol buffers, in blocks of 32 KiB after 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the whole record, or the last part of it
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def sessions(work) -> list[list]:
    """The records of each session of the run."""
    return [list(records(file)) for file in sorted((work / "out" / "wandb").glob("offline-run-*/*.wandb"))]


def history(found) -> list[dict]:
    rows = [record.history for record in found if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in rows]


def test_wandb_offline_holds_the_run(work, tiny, wandb, monkeypatch):
    raises_an_alarm(work, monkeypatch)
    assert grpo(tiny, "--track", "wandb") == 0
    (found,) = sessions(work)
    rows = history(found)
    assert [row["_step"] for row in rows] == STEPS
    assert [row["entropy"] for row in rows] == pytest.approx(column(work, "entropy"))
    assert rows[0]["samples/_type"] == "table-file"
    assert rows[-1]["report/_type"] == "html-file"
    (run,) = {
        (record.run.run_id, record.run.project, record.run.display_name) for record in found if record.HasField("run")
    }
    assert run == (json.loads((work / "out" / "trackers.json").read_text())["wandb"]["id"], "tether", "out")
    config = {item.key: json.loads(item.value_json) for record in found for item in record.run.config.update}
    assert config["kl_coef"] == 0.04
    assert [record.alert.title for record in found if record.HasField("alert")] == ["flat_rewards"]
    assert [record.exit.exit_code for record in found if record.HasField("exit")] == [0]
    table = json.loads(next((work / "out").glob("wandb/*/files/media/table/samples_0*")).read_text())
    assert table["columns"][:3] == ["step", "prompt", "completion"]


def test_wandb_continues_the_run_and_has_each_step_once(work, tiny, wandb):
    died_and_resumed(tiny, "wandb")
    first, second = sessions(work)
    assert [row["_step"] for row in history(first) + history(second)] == STEPS
    assert {record.run.run_id for record in first + second if record.HasField("run")}.__len__() == 1
    assert [record.exit.exit_code for record in first if record.HasField("exit")] == [1]


def test_wandb_without_an_account_does_not_ask(work, tiny, wandb, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "online")
    assert grpo(tiny, "--track", "wandb") == 0
    assert "not logged in: run 'wandb login', or set WANDB_MODE=offline" in capsys.readouterr().err


def test_wandb_with_a_server_that_is_not_there(work, tiny, wandb, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", CLOSED_PORT)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(supervised, "PATIENCE", 5.0)
    assert grpo(tiny, "--track", "wandb") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("--track")]
    assert len(lines) == 1
    assert "the run continues without it" in lines[0]
    assert not [path for path in (work / "out").rglob("*") if path.is_file() and b"0" * 40 in path.read_bytes()]


# Trackio


@pytest.fixture
def trackio(monkeypatch, tmp_path):
    """Trackio, which decides where it stores when it is imported."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    for name in [name for name in sys.modules if name.split(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    return pytest.importorskip("trackio")


def logged(work) -> list[dict]:
    with sqlite3.connect(work / "store" / "tether.db") as database:
        found = database.execute("SELECT step, metrics FROM metrics ORDER BY id").fetchall()
    return [{"step": step, **json.loads(metrics)} for step, metrics in found]


def test_trackio_holds_the_run(work, tiny, trackio, monkeypatch):
    raises_an_alarm(work, monkeypatch)
    assert grpo(tiny, "--track", "trackio") == 0
    rows = [row for row in logged(work) if "entropy" in row]
    assert [row["step"] for row in rows] == STEPS
    assert [row["entropy"] for row in rows] == pytest.approx(column(work, "entropy"))
    assert rows[0]["samples"]["_type"] == "trackio.table"
    (end,) = [row for row in logged(work) if "final/steps" in row]
    assert end["final/steps"] == 4
    (run,) = trackio.Api().runs("tether")
    assert run.config["kl_coef"] == 0.04
    assert [alert["title"] for alert in run.alerts()] == ["flat_rewards"]
    report = (work / "out" / "report.html").read_bytes()
    assert any(path.is_file() and path.read_bytes() == report for path in (work / "store").rglob("*"))


def test_trackio_continues_the_run_and_has_each_step_once(work, tiny, trackio):
    died_and_resumed(tiny, "trackio")
    assert [row["step"] for row in logged(work) if "entropy" in row] == STEPS
    assert len(trackio.Api().runs("tether")) == 1


# MLflow


@pytest.fixture
def mlflow(monkeypatch, tmp_path):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    MlflowClient(uri).search_experiments()  # makes the tables, which takes seconds
    return lambda: MlflowClient(uri)


def mlflow_run(client):
    (run,) = client.search_runs([client.get_experiment_by_name("tether").experiment_id])
    return run


def test_mlflow_holds_the_run(work, tiny, mlflow, monkeypatch):
    raises_an_alarm(work, monkeypatch)
    assert grpo(tiny, "--track", "mlflow") == 0
    client = mlflow()
    run = mlflow_run(client)
    found = client.get_metric_history(run.info.run_id, "entropy")
    assert [one.step for one in found] == STEPS
    assert [one.value for one in found] == pytest.approx(column(work, "entropy"))
    assert (run.info.run_name, run.info.status) == ("out", "FINISHED")
    assert run.data.params["kl_coef"] == "0.04"
    assert run.data.metrics["final/steps"] == 4
    assert run.data.tags["alarm.flat_rewards"].startswith("step 2: ")
    assert {one.path for one in client.list_artifacts(run.info.run_id)} == {
        "report.html",
        "summary.json",
        "samples.json",
    }
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "samples.json")).read_text())
    assert table["columns"][:3] == ["step", "prompt", "completion"]
    assert [row[0] for row in table["data"]] == [step for step in STEPS for _ in range(4)]
    page = Path(client.download_artifacts(run.info.run_id, "report.html"))
    assert page.read_bytes() == (work / "out" / "report.html").read_bytes()


def test_mlflow_continues_the_run_and_has_each_step_once(work, tiny, mlflow):
    dies_after(3, tiny, "--quiet", "--save-every", "2", "--track", "mlflow")
    client = mlflow()
    assert mlflow_run(client).info.status == "KILLED"
    assert tether("resume out") == 0
    run = mlflow_run(client)
    assert run.info.status == "FINISHED"
    assert [one.step for one in client.get_metric_history(run.info.run_id, "reward")] == STEPS


def test_mlflow_with_a_server_that_is_not_there(work, tiny, mlflow, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", CLOSED_PORT)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert grpo(tiny, "--track", "mlflow") == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("--track")]
    assert "the run continues without it" in line
