"""Questions that may take for ever: each costs its deadline and no more, and nothing is left of who answered."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from helpers import group
from tether.errors import RewardError
from tether.rewards import grader as module
from tether.rewards import text_rules
from tether.rewards.function import FunctionReward
from tether.rewards.grader import Grader
from tether.rewards.text_rules import Checked, pattern
from tether.stop_requests import Interrupted, heeded

HANGS = "a" * 60
"""Which (a+)+b takes 2^60 steps to refuse."""
NO_PROC = "needs /proc"


@pytest.fixture
def grader():
    return Grader("mine", "search", "(a+)+b", deadline=0.5)


def alive(pid: int) -> bool:
    """Whether it runs: one that has ended and has not been waited for does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return bool(state.strip()) and not state.startswith("Z")


def gone(pid: int, within: float = 5.0) -> bool:
    until = time.monotonic() + within
    while alive(pid):
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def test_it_answers_and_is_started_once(grader):
    assert grader._process is None  # not before it is needed
    assert [grader.ask(text) for text in ("aab", "aa", "b", "ab")] == [True, False, False, True]
    first = grader._process.pid
    assert grader.ask("aab") is True
    assert grader._process.pid == first


def test_any_text_arrives_as_it_is():
    for text in ("", "\n", "\r\n\x00\u2028", "\ud800", "é😀", '"]}\n["', "x" * 300_000):
        assert Grader("mine", "fullmatch", r".*", deadline=5.0).ask(text) is True
    assert Grader("mine", "fullmatch", "\ud800\n\\n").ask("\ud800\n\n") is True


def test_a_question_without_an_answer_costs_its_deadline_and_no_more(grader):
    assert grader.ask("aab") is True
    started = time.monotonic()
    for _ in range(2):
        assert grader.ask(HANGS) is None
    assert grader.ask("aab") is True  # by a process that was started meanwhile
    assert 1.0 <= time.monotonic() - started < 5.0  # on a busy machine too


def test_answers_that_come_late_start_one_spare_process(grader):
    assert grader.ask("aab") is True
    grader.deadline = 0.02
    for _ in range(30):  # each may pass the half of its deadline
        grader.ask("a" * 16)
    assert len(grader._alive) <= 2


def test_nothing_is_left_of_it():
    grader = Grader("mine", "search", "(a+)+b", deadline=0.5)
    grader.ask("aab")
    grader.ask(HANGS)
    grader.ask("aab")
    pids = [process.pid for process in grader._alive]
    assert pids
    del grader
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize("what", ["aab", HANGS])
def test_it_ends_with_its_parent_even_while_it_computes(what):
    program = f"""
        import threading
        from tether.rewards.grader import Grader
        grader = Grader("mine", "search", "(a+)+b", deadline=1.0)
        grader.ask("aab")
        print(grader._process.pid, flush=True)
        threading.Timer(0.2, lambda: print("computes", flush=True)).start()
        grader.ask({what!r})
        threading.Event().wait()
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE) as parent:
        pid = int(parent.stdout.readline())
        parent.stdout.readline()
        parent.kill()
    assert gone(pid, within=3.0)


def test_threads_share_it(grader):
    said = {}

    def ask(i):
        said[i] = [grader.ask("a" * (i + 1) + "b" * (i % 2)) for _ in range(20)]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {i: [bool(i % 2)] * 20 for i in range(8)}
    assert len(grader._alive) == 1


def test_a_process_that_dies_is_an_error_and_the_next_question_is_answered(grader):
    grader.ask("aab")
    threading.Timer(0.1, os.kill, (grader._process.pid, signal.SIGKILL)).start()
    with pytest.raises(
        RewardError, match=r"^reward 'mine': its process failed on 'aaa.*' \(it ended with exit status -9"
    ):
        grader.ask(HANGS)
    assert grader.ask("aab") is True
    os.kill(grader._process.pid, signal.SIGKILL)
    grader._process.wait()
    with pytest.raises(RewardError, match="it ended with exit status -9"):
        grader.ask("aab")


def test_one_that_does_not_start_says_why(monkeypatch, tmp_path):
    with pytest.raises(
        RewardError, match=r"^reward 'mine': its process failed \(ValueError: no such task: nonsense\)$"
    ):
        Grader("mine", "nonsense").ask("x")
    monkeypatch.setattr(module, "PROGRAM", tmp_path / "missing.py")
    with pytest.raises(RewardError, match=r"its process failed \(it ended with exit status 2\)"):
        Grader("mine", "search", "x").ask("x")
    (tmp_path / "missing.py").write_text("import time\ntime.sleep(20)\n")
    monkeypatch.setattr(module, "STARTING", 0.2)
    with pytest.raises(RewardError, match=r"its process did not start within 0.2 s"):
        Grader("mine", "search", "x").ask("x")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(RewardError, match=r"its process cannot be started \(.*No such file"):
        Grader("mine", "search", "x").ask("x")


def stopped(timer, grader):
    timer.start()
    FunctionReward("mine", Checked(grader, "")).judge([group([0], [[1]])])


def test_a_request_to_stop_leaves_no_reply_to_the_next_question(grader, monkeypatch):
    grader.deadline = 20.0
    grader.ask("aab")
    monkeypatch.setattr(text_rules, "text_of", lambda _: HANGS)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted), heeded():
        stopped(timer, grader)
    assert grader.ask("aab") is True


def test_it_imports_nothing_of_tether_and_no_torch():
    program = f"""
        import sys
        sys.argv = [{str(module.PROGRAM)!r}]
        import importlib.util
        spec = importlib.util.spec_from_file_location("program", sys.argv[0])
        program = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(program)
        for task in (["search", "x"], ["schema", "{{}}"], ["math"]):
            try:
                program.answerer(*task)
            except ImportError:
                pass
        print(*sys.modules)
    """
    found = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {name.partition(".")[0] for name in found} & {"tether", "torch", "transformers", "numpy", "pyarrow"}


@pytest.mark.skipif(not os.path.exists("/proc/self/environ"), reason=NO_PROC)
def test_it_sees_no_secret_of_the_environment(monkeypatch, grader):
    monkeypatch.setenv("WANDB_API_KEY", "marker")
    grader.ask("x")
    with open(f"/proc/{grader._process.pid}/environ", "rb") as file:
        assert b"marker" not in file.read()


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is set on Linux")
def test_its_memory_is_limited(grader):
    grader.ask("x")
    with open(f"/proc/{grader._process.pid}/limits") as file:
        limits = {line.split("  ")[0]: line.split() for line in file}
    assert str(4 * 2**30) in limits["Max address space"]


def test_a_pattern_that_backtracks_is_an_error_and_no_zero():
    rule = pattern("format", "(a+)+b", "fullmatch", deadline=0.3)
    assert rule(completions=["aab ", "aa"]) == [1.0, 0.0]
    with pytest.raises(RewardError) as caught:
        rule(completions=["aab", HANGS])
    assert str(caught.value) == (
        f"reward 'format' took longer than 0.3 s for the completion {HANGS!r}; the regular expression backtracks: "
        "avoid a repeat within a repeat, such as (a+)+"
    )
    assert rule(completions=["aab"]) == [1.0]
