"""One side of a benchmark: a long-lived process that does one step at each line on its input and says how long it took.

Both sides are processes of the same kind, so that threads, memory and caches are equal; while one works, the other is
blocked in a read. This module is all that the sides have in common, and imports neither tether nor its peers.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a step consists of: the same for both sides."""

    model: str
    """Directory of the policy and its tokenizer."""
    reward_model: str
    """Directory of a sequence classifier of the policy's size."""
    prompts: str
    """JSON lines with ``prompt``."""
    pairs: str = ""
    """JSON lines with ``chosen`` and ``rejected``."""
    device: str = "cpu"
    dtype: str = "float32"
    group_size: int = 1
    prompts_per_step: int = 1
    max_new_tokens: int = 64
    kl_coef: float = 0.0
    learning_rate: float = 1e-6
    pairs_per_step: int = 1
    max_length: int = 512
    """Longest side of a preference pair, in tokens; there are no longer ones."""
    steps_per_turn: int = 1
    """Optimiser steps that one answer covers."""
    peer_rows: int = 64
    """Sequences (for reward models: pairs) that the peer takes through the model at once in training."""
    products: str = "float32"
    """What tether multiplies float32 weights in."""
    critic_trunk: bool = True
    """Whether tether's critic has a trunk of its own, as the peer's has."""
    tokens_at_once: int = 8192
    """Tokens that tether takes through the model at once in training."""

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self)))
        return path

    @staticmethod
    def read(path: str) -> Spec:
        return Spec(**json.loads(Path(path).read_text()))

    def rows(self, name: str) -> list[dict[str, str]]:
        """The rows of ``prompts`` or ``pairs``."""
        with open(getattr(self, name), encoding="utf-8") as file:
            return [json.loads(line) for line in file]


class Turns:
    """The worker's end of the conversation: ``wait`` for a turn, work, ``answer``.

    Whatever libraries print goes to the error stream; the output stream holds answers alone.
    """

    def __init__(self, synchronise: Callable[[], object]) -> None:
        self.synchronise = synchronise
        self.out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def wait(self) -> None:
        """Say that this side is ready, block until its turn comes, start the clock. Ends the process when asked to."""
        self.out.write("ready\n")
        if sys.stdin.readline() != "step\n":
            self.out.close()
            os._exit(0)  # out of the middle of a trainer's loop
        self.clock, self.cpu_clock = time.perf_counter(), time.process_time()

    def answer(self, facts: dict[str, float] | None = None) -> None:
        """The turn is over."""
        self.synchronise()
        seconds = time.perf_counter() - self.clock
        said = {
            "seconds": seconds,
            "cpu_seconds": time.process_time() - self.cpu_clock,
            "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            **(facts or {}),
        }
        self.out.write(json.dumps(said) + "\n")


def serve(step: Callable[[], dict[str, float] | None], synchronise: Callable[[], object]) -> None:
    """One ``step`` a turn, for ever."""
    turns = Turns(synchronise)
    while True:
        turns.wait()
        turns.answer(step())
