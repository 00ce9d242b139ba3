"""One side of a benchmark: a long-lived process that does one step per line of its input and reports how long it took.

Both sides are processes of the same kind, so that threads, memory and caches are equal; while one works, the other is
blocked in a read. This module is the only one that the sides share, and imports neither tether nor its peers.
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
    """The specification of a step, the same for both sides."""

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
    """Maximum length of a side of a preference pair, in tokens."""
    steps_per_turn: int = 1
    """Optimizer steps that one answer covers."""
    peer_rows: int = 64
    """Sequences (for reward models: pairs) per training forward pass of the peer."""
    matmul_dtype: str = "float32"
    """Dtype in which tether multiplies float32 weights."""
    critic_trunk: bool = True
    """Whether tether's critic has a trunk of its own, like the peer's."""
    tokens_at_once: int = 8192
    """Tokens per training forward pass of tether."""

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
    """The worker's side of the protocol: ``wait`` for a turn, work, ``answer``.

    Output of libraries goes to the error stream; the output stream holds only answers.
    """

    def __init__(self, synchronise: Callable[[], object]) -> None:
        self.synchronise = synchronise
        self.out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def wait(self) -> None:
        """Report that this side is ready, block until its turn, start the clock. Ends the process when asked to."""
        self.out.write("ready\n")
        if sys.stdin.readline() != "step\n":
            self.out.close()
            os._exit(0)  # out of the middle of a trainer's loop
        self.clock, self.cpu_clock = time.perf_counter(), time.process_time()

    def answer(self, facts: dict[str, float] | None = None) -> None:
        """End the turn and report it."""
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
    """One ``step`` per turn, without end."""
    turns = Turns(synchronise)
    while True:
        turns.wait()
        turns.answer(step())
