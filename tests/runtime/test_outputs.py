"""What is written to a path that a person named: whole files, and nothing but regular files is ever replaced."""

from __future__ import annotations

import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from commandline import contents, read_rows, tether, write_rows
from runs import RS, SFT, TASK
from tether.errors import RunError
from tether.runtime import files
from tether.runtime.files import atomic_write, is_stream, require_file, sync, write_output

GENERATE = "generate --model {tiny} --prompts p.jsonl --max-new-tokens 2 --out"
TO_TRAIN = f"{TASK.replace('--out out ', '')} --out"
EVERY_COMMAND = [
    TO_TRAIN,
    f"{SFT.replace('--out out ', '')} p.jsonl --out",
    RS.replace("--out out", "--reward r.py:fn --out"),
    GENERATE,
    "report run --out",
    "quickstart --out",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    (tmp_path / "r.py").write_text("def fn(completions, **_):\n    return [0.0] * len(completions)\n")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("format: 2\ncommand: grpo\n")
    return tmp_path


def read_in_background(path: Path) -> tuple[threading.Thread, list[bytes]]:
    """What arrives in a pipe, once the thread has ended."""
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(path.read_bytes()), daemon=True)
    reader.start()
    return reader, found


def test_a_pipe_is_written_to_and_stays(here, tiny):
    os.mkfifo(here / "pipe")
    reader, found = read_in_background(here / "pipe")
    assert tether(GENERATE.format(tiny=tiny), "pipe") == 0
    reader.join(timeout=60)
    assert found[0].count(b'"completion"') == 2
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)


def test_a_pipe_behind_a_link_is_written_to_and_stays(here):
    os.mkfifo(here / "pipe")
    (here / "link").symlink_to("pipe")
    reader, found = read_in_background(here / "pipe")
    write_output(here / "link", b"x")
    reader.join(timeout=60)
    assert found == [b"x"]
    assert (here / "link").is_symlink()
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)


@pytest.mark.parametrize("command", [GENERATE, "report run --out"])
@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_by_its_name_is_written_to(command, name, here, tiny, capfd):
    before = os.lstat("/dev/stdout")
    assert tether(command.format(tiny=tiny), name) == 0
    said = capfd.readouterr().out
    assert ("completion" if command == GENERATE else "</html>") in said
    assert not said.endswith("stdout\n")  # the page alone, without the line that says where it is
    assert os.path.samestat(before, os.lstat("/dev/stdout"))


def test_a_device_is_written_to_and_stays(here, tiny):
    """A copy of the null device, so that a fault here harms nothing."""
    try:
        os.mknod(here / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (here / "null").open("wb").close()
    except OSError:
        pytest.skip("devices cannot be made or opened here")
    assert tether(GENERATE.format(tiny=tiny), "null") == 0
    assert tether("report run --out", "null") == 0
    assert stat.S_ISCHR(os.lstat("null").st_mode)


def test_output_appends_where_the_descriptor_does(tmp_path):
    """As ``tether generate --out /dev/stdout >> all.jsonl`` has to."""
    file = tmp_path / "all.jsonl"
    file.write_bytes(b"before\n")
    with file.open("ab") as out:
        write_output(Path(f"/dev/fd/{out.fileno()}"), b"after\n")
    assert file.read_bytes() == b"before\nafter\n"


def test_a_full_device_is_one_line():
    with pytest.raises(RunError, match=r"/dev/full: cannot be written \(No space left on device\)"):
        write_output(Path("/dev/full"), b"x")


def test_through_a_link_the_file_is_replaced_and_not_the_link(tmp_path):
    (tmp_path / "place").mkdir()
    target, link, twice = tmp_path / "place" / "real.jsonl", tmp_path / "link", tmp_path / "twice"
    link.symlink_to(target)
    twice.symlink_to(link)
    for content in (b"new", b"newer"):  # first it leads to nothing yet
        write_output(twice, content)
        assert target.read_bytes() == content
        assert link.is_symlink()
        assert twice.is_symlink()
    assert {path.name for path in target.parent.iterdir()} == {"real.jsonl"}


def test_a_file_that_is_replaced_keeps_its_permissions(tmp_path):
    file = tmp_path / "private.jsonl"
    file.write_bytes(b"old")
    file.chmod(0o600)
    write_output(file, b"new")
    assert (file.read_bytes(), stat.S_IMODE(file.stat().st_mode)) == (b"new", 0o600)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "out"
    file.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunError, match="No space left"):
        write_output(file, b"new")
    assert contents(tmp_path) == {"out": b"old"}


def test_the_longest_names_can_be_written(tmp_path):
    for name in ("x" * 255, "é" * 127):
        write_output(tmp_path / name, b"new")
        assert contents(tmp_path).pop(name) == b"new"


def test_what_nothing_should_be_written_to_is_refused_before_the_work(here):
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(here / "socket"))
        with pytest.raises(RunError, match="is a socket"):
            require_file(here / "socket")
    (here / "loop").symlink_to("loop")
    with pytest.raises(RunError, match="leads back to itself"):
        require_file(here / "loop")
    (here / "nowhere").symlink_to("missing/file")
    with pytest.raises(RunError, match="missing does not exist"):
        require_file(here / "nowhere")
    (here / "to a directory").symlink_to("run")
    with pytest.raises(RunError, match="is a directory"):
        require_file(here / "to a directory")


@pytest.mark.parametrize("out", ["/", "//", "/..", "/dev/null/x", "p.jsonl/x"])
@pytest.mark.parametrize("command", EVERY_COMMAND)
def test_an_impossible_output_is_one_line_of_every_command(command, out, here, tiny, capfd):
    before = contents(here)
    assert tether(command.format(tiny=tiny), out) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert out.rstrip("/") in said
    assert contents(here) == before


@pytest.mark.parametrize("kind", ["device", "pipe", "link to nothing"])
def test_a_run_directory_must_be_one(kind, here, tiny, capfd):
    if kind == "pipe":
        os.mkfifo(here / "out")
    elif kind == "link to nothing":
        (here / "out").symlink_to("missing")
    out = "/dev/null" if kind == "device" else "out"
    assert tether(TO_TRAIN.format(tiny=tiny), out) == 2
    assert "--out must name a directory" in capfd.readouterr().err
    assert not (here / "missing").exists()


def test_the_page_of_a_run_replaces_a_link_in_it(here):
    """What lies in a run directory is not the user's word."""
    (here / "thesis.tex").write_text("years")
    (here / "run" / "report.html").symlink_to(here / "thesis.tex")
    assert tether("report run") == 0
    assert (here / "thesis.tex").read_text() == "years"
    assert not (here / "run" / "report.html").is_symlink()


def test_a_file_never_takes_the_place_of_a_directory(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    with pytest.raises(RunError, match="is a directory"):
        write_output(tmp_path / "out", b"x")
    with pytest.raises(RunError, match="cannot be written"), atomic_write(tmp_path / "out") as partial:
        partial.write_bytes(b"x")
    assert contents(tmp_path) == {"out": b"", "out/thesis.tex": b"years"}


def test_an_ordinary_file_is_no_stream(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "missing", tmp_path / "dev" / "stdout"):
        assert not is_stream(path)
    assert is_stream(Path("/dev/null"))


def test_a_directory_that_cannot_be_flushed_stops_nothing(tmp_path, monkeypatch):
    """File systems in user space answer EINVAL for directories; for a file it is an error as before."""
    flush = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with atomic_write(tmp_path / "d", durable=True) as partial:
        partial.mkdir()
        (partial / "file").write_bytes(b"x")
    assert contents(tmp_path) == {"d": b"", "d/file": b"x"}
    for number in (5, 28):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", lambda _, number=number: (_ for _ in ()).throw(OSError(number, "broken")))
            with pytest.raises(OSError, match="broken"):
                sync(tmp_path)


def test_generate_writes_one_line_per_completion(here, tiny):
    assert tether(GENERATE.format(tiny=tiny), "c.jsonl") == 0
    assert [row["prompt"] for row in read_rows(here / "c.jsonl")] == ["a", "b"]
