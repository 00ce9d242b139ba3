"""A tracker that fails or hangs is said once, and changes nothing in the run."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import pytest

from commandline import numbers, tether, workspace
from runs import LINES
from tether.trackers import names, supervised, tracking
from tracked import Remembering, dies_after, hanging, raising, run

FAKE = "--track trackio"
CALLS = ("start", "log 1", "log 2", "log 4", "finish", "close")


@pytest.fixture
def fake(monkeypatch):
    """Makes ``--track trackio`` a tracker of the test's own; the package need not be there."""

    def install(backend, name="trackio"):
        monkeypatch.setitem(tracking.BACKENDS, name, lambda: backend)
        monkeypatch.setitem(names.NEEDED, name, ())
        return backend

    return install


@pytest.fixture(autouse=True)
def _quick_report(monkeypatch):
    """Stands for the page, which takes longer than the run."""

    def write(runs):
        (page := runs[0] / "report.html").write_text("report")
        return page

    monkeypatch.setattr(tracking, "write_report", write)


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    """What the same run leaves without a tracker."""
    directory = tmp_path_factory.mktemp("plain")
    workspace(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        assert tether(f"{LINES['grpo']} --quiet --model {tiny} --out out") == 0
    return numbers(directory / "out")


def grpo(tiny, *more):
    return tether(f"{LINES['grpo']} --quiet --model {tiny} --out out", *more)


def said(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("--track")]


def test_every_row_the_summary_and_the_report_arrive(work, tiny, fake, plain, capsys):
    backend = fake(Remembering(where="http://me:secret@host/run"))
    assert tether(f"{LINES['grpo']} --model {tiny} --out out {FAKE}") == 0
    assert [row.step for row in backend.rows] == [1, 2, 3, 4]
    rows = [json.loads(line) for line in (work / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [{"step": float(row.step), **row.metrics} for row in backend.rows] == rows
    (run,), (ending,) = backend.runs, backend.endings
    assert (run.name, run.identity, run.first) == ("out", {}, 1)
    assert run.config["kl_coef"] == 0.04
    assert ending.step == 4
    assert ending.summary == json.loads((work / "out" / "summary.json").read_text())
    assert ending.report == work / "out" / "report.html"
    assert ending.report.is_file()
    assert ending.figures["final/steps"] == 4
    assert backend.closed == [True]
    assert json.loads((work / "out" / "trackers.json").read_text()) == {"trackio": {"id": "first", "step": 4}}
    assert said(capsys) == ["--track trackio: http://***@host/run"]
    assert numbers(work / "out") == plain


def test_samples_are_those_of_the_rollout_files(work, tiny, fake):
    import pyarrow.parquet

    backend = fake(Remembering())
    assert grpo(tiny, "--track", "trackio", "--rollouts-every", 2) == 0
    assert [row.step for row in backend.rows if row.samples] == [2, 4]
    found = pyarrow.parquet.read_table(work / "out" / "rollouts" / "step_000004.parquet").to_pylist()
    columns = backend.rows[-1].samples[0].keys()
    assert list(backend.rows[-1].samples) == [{name: row[name] for name in columns} for row in found]
    assert "rewards/fn" in columns


@pytest.mark.parametrize(
    ("call", "error"), [*((call, ConnectionError("no\nroute")) for call in CALLS), ("log 2", SystemExit(1))]
)
def test_one_that_fails_is_said_once_and_another_goes_on(work, tiny, fake, plain, capsys, call, error):
    fake(Remembering(before=raising(call, error)))
    other = fake(Remembering(), "mlflow")
    assert grpo(tiny, "--track", "trackio", "--track", "mlflow") == 0
    (line,) = said(capsys)
    assert line.startswith("--track trackio: failed ")
    assert type(error).__name__ in line
    assert line.endswith("the run continues without it")
    assert [row.step for row in other.rows] == [1, 2, 3, 4]
    assert other.closed == [True]
    assert numbers(work / "out") == plain


@pytest.mark.parametrize("call", ["start", "log 2", "close"])
def test_one_that_hangs_is_said_once(work, tiny, fake, plain, capsys, monkeypatch, call):
    monkeypatch.setattr(supervised, "PATIENCE", 0.5)
    let_go = threading.Event()
    fake(Remembering(before=hanging(call, let_go)))
    try:
        assert grpo(tiny, FAKE.split()[0], "trackio") == 0
        (line,) = said(capsys)
        assert line.startswith("--track trackio: ")
        assert "0 s" in line
        assert numbers(work / "out") == plain
    finally:
        let_go.set()
        for thread in threading.enumerate():
            if thread.name.startswith(names.THREAD):
                thread.join(10)


def test_training_does_not_wait_for_a_slow_one(work, tiny, fake):
    """The first call is not over before the last step is: a run that waited for it would never come there."""
    trained, waited = threading.Event(), []

    def slow(call):
        if call == "log 1":
            waited.append(trained.wait(60))

    backend = fake(Remembering(before=slow))

    def hook(record):
        if record.step == record.total:
            trained.set()

    run(tiny, "--quiet", "--track", "trackio", hooks=[hook])
    assert waited == [True]
    assert [row.step for row in backend.rows] == [1, 2, 3, 4]


def test_the_report_may_fail(work, tiny, fake, plain, capsys, monkeypatch):
    def broken(_):
        raise ValueError("no fonts")

    monkeypatch.setattr(tracking, "write_report", broken)
    backend = fake(Remembering())
    assert grpo(tiny, "--track", "trackio") == 0
    assert backend.endings[0].report is None
    (line,) = said(capsys)
    assert "no report (no fonts)" in line
    assert numbers(work / "out") == plain


def test_a_missing_package_is_an_error_before_anything_is_read(work, monkeypatch, capsys):
    monkeypatch.setitem(names.NEEDED, "wandb", ("a_package_that_is_not_there",))
    assert grpo("no-such-model", "--track", "wandb") == 2
    line = capsys.readouterr().err
    assert "--track wandb: the package a_package_that_is_not_there is not installed" in line
    assert "pip install 'tether-rlhf[wandb]'" in line
    assert not (work / "out").exists()


def test_an_unknown_tracker_is_an_error_that_lists_them(work, capsys):
    assert grpo("no-such-model", "--track", "comet") == 2
    line = capsys.readouterr().err
    assert "comet" in line
    assert "tensorboard" in line


@pytest.mark.parametrize(("rewinds", "again"), [(False, [1, 2, 3, 4]), (True, [1, 2, 3, 3, 4])])
def test_a_resumed_run_is_the_same_one_and_steps_come_once(work, tiny, fake, rewinds, again):
    """The run dies after step 3, and its last checkpoint is of step 2. One that rewinds is told where to."""
    first = fake(Remembering(rewinds=rewinds))
    dies_after(3, tiny, "--quiet", "--save-every", "2", "--track", "trackio")
    assert first.closed == [False]
    second = fake(Remembering(rewinds=rewinds))
    assert tether("resume out") == 0
    (run,) = second.runs
    assert (run.identity, run.first) == ({"id": "first"}, 3)
    assert [row.step for row in first.rows + second.rows] == again
    assert second.closed == [True]


def test_a_run_begins_anew_where_the_file_of_identities_is_damaged(work, tiny, fake):
    fake(Remembering())
    dies_after(3, tiny, "--quiet", "--save-every", "2", "--track", "trackio")
    (work / "out" / "trackers.json").write_text("[")
    second = fake(Remembering())
    assert tether("resume out") == 0
    assert second.runs[0].identity == {}
    assert [row.step for row in second.rows] == [3, 4]


def test_a_resumed_run_may_have_another_tracker(work, tiny, fake):
    fake(Remembering())
    other = fake(Remembering(), "mlflow")
    dies_after(3, tiny, "--quiet", "--save-every", "2", "--track", "trackio")
    assert tether("resume out --track mlflow") == 0
    assert [row.step for row in other.rows] == [3, 4]


def test_a_run_that_fails_before_its_first_row_begins_nothing(work, tiny, fake):
    backend = fake(Remembering())
    (work / "r.py").write_text("def fn(completions, **_):\n    raise ValueError\n")
    assert grpo(tiny, "--track", "trackio") == 2
    assert backend.runs == []
    assert not (work / "out").exists()


def test_a_process_ends_though_a_tracker_hangs():
    """Libraries wait for their threads when Python exits."""
    script = (
        "import threading, tether.cli as cli\n"
        "from tether.trackers.names import THREAD\n"
        "threading.Thread(target=threading.Event().wait, name=THREAD + 'wandb').start()\n"
        "cli.main = lambda: 0\n"
        "print('over')\n"
        "cli.run()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "over\n")
