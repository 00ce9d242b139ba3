"""The command line: which command, its options, and what an error looks like."""

from __future__ import annotations

import codecs
import ctypes
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType

from tether import __version__
from tether.commands import TABLE, Table, find
from tether.errors import ConfigError, TetherError
from tether.names import closest, did_you_mean
from tether.stop_requests import EXIT_CODE, Interrupted
from tether.trackers.names import THREAD
from tether.untrusted import one_line

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""


def usage(table: Table) -> str:
    """What ``tether --help`` prints."""
    lines = [
        f"tether {__version__}: align a language model to what people prefer",
        "",
        "usage: tether COMMAND [OPTIONS]",
    ]
    for title in dict.fromkeys(command.group for command in table):
        members = [command for command in table if command.group == title]
        lines += ["", f"{title}:", *(f"  {command.name:<20}{command.summary}" for command in members)]
    lines += ["", "'tether COMMAND --help' lists a command's options; '--config FILE.yaml' reads them from a file.", ""]
    return "\n".join(lines)


def dispatch(arguments: Sequence[str], table: Table = TABLE) -> None:
    """Run one command of the ``table``. Imports wait until the command is known, so that help is instant."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(table), end="")
        return
    if arguments[0] in ("-V", "--version"):
        print(f"tether {__version__}")
        return
    name, rest = arguments[0], arguments[1:]
    command = find(name, table)
    from tether.flags import parse

    if command is None:
        close = did_you_mean(closest(name, [one.name for one in table]))
        raise ConfigError(f"unknown command {name!r}", hint=f"{close} ('tether --help' lists them)".lstrip())
    options = parse(name, command.options_class(), rest, first=command.first)
    if command.takes_table:
        command.function()(options, table=table)
    else:
        command.function()(options)


def tell(arguments: Sequence[str], error: object) -> None:
    """One line that says what went wrong; ``str(error)`` composes it."""
    command = " ".join(["tether", *arguments[:1]])
    print(one_line(f"{command}: {error}"), file=sys.stderr)


def stopped_outside_a_run(arguments: Sequence[str], by: str, table: Table) -> str:
    """What is said where a signal comes before a command trains, or to one that does not."""
    command = find(arguments[0], table) if arguments else None
    trains = command is not None and (command.resumable or command.name == "resume")
    return f"stopped by {by} before training began; give the command again" if trains else f"stopped by {by}"


def interrupt(number: int, _: FrameType | None) -> None:
    """The handler of SIGTERM outside of training, where it is like Ctrl-C."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def main(arguments: Sequence[str] | None = None, table: Table = TABLE) -> int:
    """Run a command line. Exit codes: 0 done, 2 wrong input, 3 stopped by a guard, 75 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        dispatch(arguments, table)
    except TetherError as error:
        tell(arguments, error)
        return error.exit_code
    except Interrupted as error:
        tell(arguments, error)
        return EXIT_CODE
    except KeyboardInterrupt as stop:
        tell(arguments, stopped_outside_a_run(arguments, str(stop) or "SIGINT", table))
        return EXIT_CODE
    except BrokenPipeError:
        return 0
    return 0


def escaped(error: UnicodeError) -> tuple[str, int]:
    """What an encoding cannot hold, as JSON escapes it: a line of JSON stays the same JSON."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def keep_freed_memory() -> None:
    """Make the C library of this process keep freed memory for the tensors that come next, instead of giving it back to
    the system, which clears each page anew: a training step of a small model on a CPU is a fifth faster, in no more
    memory. Nothing changes where the library is not glibc 2.35 or newer."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and mallopt(MMAP_THRESHOLD, 2**31 - 1):  # older ones refuse so high a threshold
        mallopt(TRIM_THRESHOLD, -1)  # none: it is taken for an unsigned number


def run() -> None:
    """The process's entry point: :func:`main`, and then the end."""
    keep_freed_memory()
    signal.signal(signal.SIGTERM, interrupt)
    codecs.register_error("tether.escaped", escaped)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="tether.escaped")
    code = main()
    others = [one for one in threading.enumerate() if one is not threading.main_thread()]
    hangs = any(one.name.startswith(THREAD) for one in others)
    if hangs or (code and any(not one.daemon for one in others)):
        # a reward's own threads may hang, and what a tracker's library does at exit; Python would wait for them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
