"""The command line: which command, its options, and what an error looks like."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from tether import __version__
from tether.errors import ConfigError, TetherError
from tether.interruption import EXIT_CODE, Interrupted
from tether.untrusted import one_line

GROUPS = {
    "start here": {
        "quickstart": "all of RLHF on a small model, in a few minutes, with a report",
        "doctor": "what this machine has, and whether tether works on it",
    },
    "train": {
        "sft": "fine-tune on texts or on prompts with completions",
        "reward": "train a reward model on preference pairs",
        "rejection-sampling": "sample N, keep the best K, fine-tune on them",
        "ppo": "improve a policy by PPO with a value function",
        "grpo": "improve a policy by GRPO",
        "resume": "go on with a run that was interrupted",
    },
    "look": {
        "generate": "sample completions",
        "eval": "measure a policy on prompts, or a reward model on pairs",
        "report": "draw a run as one HTML page",
    },
}


def usage() -> str:
    """What ``tether --help`` prints."""
    lines = [
        f"tether {__version__}: align a language model to what people prefer",
        "",
        "usage: tether COMMAND [OPTIONS]",
    ]
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:<20}{text}" for name, text in commands.items())]
    lines += ["", "'tether COMMAND --help' lists a command's options; '--config FILE.yaml' reads them from a file.", ""]
    return "\n".join(lines)


def dispatch(arguments: Sequence[str]) -> None:
    """Run one command. Imports wait until the command is known, so that help is instant."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return
    if arguments[0] in ("-V", "--version"):
        print(f"tether {__version__}")
        return
    name, rest = arguments[0], arguments[1:]
    known = [command for commands in GROUPS.values() for command in commands]
    if name not in known:
        from tether.flags import nearest

        raise ConfigError(f"unknown command {name!r}{nearest(name, known)} ('tether --help' lists them)")
    cls, body = bodies()[name]
    from tether.flags import parse

    body(parse(name, cls, rest))


def bodies() -> dict[str, tuple[type, Callable[[Any], None]]]:
    """The options and the function of every command."""
    from tether import commands, config, doctor, quickstart, resume, training

    return {
        "quickstart": (config.Quickstart, quickstart.main),
        "doctor": (config.Doctor, doctor.main),
        "sft": (config.SFT, training.train_sft),
        "reward": (config.Reward, training.train_reward),
        "rejection-sampling": (config.RejectionSampling, training.train_rejection_sampling),
        "ppo": (config.PPO, training.train_ppo),
        "grpo": (config.GRPO, training.train_grpo),
        "resume": (config.Resume, resume.resume),
        "generate": (config.Generate, commands.generate),
        "eval": (config.Eval, commands.evaluate),
        "report": (config.Report, commands.report),
    }


def tell(arguments: Sequence[str], message: object) -> None:
    """One line that says what went wrong."""
    command = " ".join(["tether", *arguments[:1]])
    print(one_line(f"{command}: {message}"), file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """A command line. Exit codes: 0 done, 2 wrong input, 3 stopped by a guard, 75 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        dispatch(arguments)
    except TetherError as error:
        tell(arguments, error)
        return error.exit_code
    except Interrupted as error:
        tell(arguments, error)
        return EXIT_CODE
    except KeyboardInterrupt:
        tell(arguments, "interrupted")
        return EXIT_CODE
    except BrokenPipeError:
        return 0
    return 0


def run() -> None:
    """The process's entry point: :func:`main`, and then the end."""
    code = main()
    if code and any(not one.daemon for one in threading.enumerate() if one is not threading.main_thread()):
        # a reward's own threads may hang, and Python would wait for them
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
