"""A configuration file holds names and values only, and garbage in a run directory is an error of one line."""

from __future__ import annotations

import time

import pytest

from hostile import TASK, complaint, run_directory

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
"""A few hundred characters that would expand to 9**12 items."""
QUADRATIC = f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 10_000)}]\n"
YAMLS = {
    "an object": ("command: !!python/object/apply:os.system ['touch marker']\n", "not valid YAML"),
    "a name": ("command: !!python/name:os.system\n", "not valid YAML"),
    "a bomb": (BOMB, "a reference"),
    "a long text, often": (QUADRATIC, "a reference"),
    "itself": ("a: &a [*a]\n", "a reference"),
    "depth": ("a: " + "[" * 20_000 + "]" * 20_000, "a collection in a collection"),
    "a list": ("- a\n", "name: value"),
    "not UTF-8": (b"\xff\xfe", "UTF-8"),
    "an invalid date": ("a: 2020-99-99\n", "not valid YAML"),
    "a long number": (f"a: {'9' * 5000}\n", "not valid YAML"),
    "a list for a name": ("{[1]: 2}\n", "not valid YAML"),
}


@pytest.mark.parametrize("command", ["report run", f"{TASK} --out out --model m --config run/config.yaml"])
@pytest.mark.parametrize("kind", YAMLS)
def test_a_configuration_holds_names_and_values_only(kind, command, here, capfd):
    content, says = YAMLS[kind]
    run_directory("config.yaml", content)
    start = time.perf_counter()
    said = complaint(command, capfd)
    assert says in said
    assert "run/config.yaml" in said
    assert len(said) < 500
    assert time.perf_counter() - start < 5


LEFTOVERS = {
    "metrics": ("metrics.jsonl", "garbage\n"),
    "summary": ("summary.json", "garbage"),
    "summary, not UTF-8": ("summary.json", b"\xff"),
    "summary, a list": ("summary.json", "[1]"),
    "summary, depth": ("summary.json", "[" * 100_000),
    "summary, other values": ("summary.json", '{"evaluation": {"policy": {"reward": "high"}}}'),
    "rollouts": ("rollouts/step_000001.parquet", "garbage"),
    "quickstart": ("samples.jsonl", "garbage"),
}


@pytest.mark.parametrize("kind", LEFTOVERS)
def test_garbage_in_a_run_directory_is_an_error_of_one_line(kind, here, capfd):
    file, content = LEFTOVERS[kind]
    run = run_directory(file, content)
    assert str(run) in complaint("report run", capfd)
    assert not (run / "report.html").exists()


METRICS = {
    "not UTF-8": b"\xff\n",
    "a list": b"[1]\n",
    "nothing": b"null\n",
    "text": b'{"step": 1.0, "reward": "high"}\n',
    "an object": b'{"step": 1.0, "reward": {"a": 1}}\n',
    "depth": b"[" * 100_000 + b"\n",
    "a long number": b'{"step": ' + b"9" * 5000 + b"}\n",
}


@pytest.mark.parametrize("kind", METRICS)
def test_metrics_that_are_not_objects_of_numbers_are_refused(kind, here, capfd):
    run = run_directory("metrics.jsonl", b'{"step": 0.0}\n' + METRICS[kind])
    assert f"{run}/metrics.jsonl:2" in complaint("report run", capfd)
