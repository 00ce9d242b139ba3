"""The monitors that every run with samples has, and what is done when one raises an alarm."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tether.errors import ConfigError
from tether.monitor.entropy import EntropyCollapse
from tether.monitor.flat_rewards import FlatRewards
from tether.monitor.judge import JudgeGap
from tether.monitor.kl import KLRunaway
from tether.monitor.length import LengthDrift
from tether.monitor.phrases import PhraseTakeover
from tether.monitor.repetition import Repetition
from tether.monitor.stuck import NotLearning
from tether.names import closest, did_you_mean
from tether.observers import Monitor

FLAT = "flat_rewards"
MONITORS: dict[str, Callable[..., Monitor]] = {
    FLAT: FlatRewards,
    "phrase_takeover": PhraseTakeover,
    "repetition": Repetition,
    "length_drift": LengthDrift,
    "entropy_collapse": EntropyCollapse,
    "kl_runaway": KLRunaway,
    "not_learning": NotLearning,
}
JUDGE_GAP = "judge_gap"
"""One per judge."""
ACTIONS = ("log", "stop")


def actions(on_alarm: Sequence[str]) -> dict[str, bool]:
    """Whether each monitor stops the run, from ``log``, ``stop`` and ``NAME=log|stop``, which counts more.

    >>> actions(["stop", "repetition=log"])["repetition"], actions(["stop"])["judge_gap"], actions([])["kl_runaway"]
    (False, True, False)

    Raises :class:`ConfigError` for anything else.
    """
    names = (*MONITORS, JUDGE_GAP)
    found = dict.fromkeys(names, False)
    for value in sorted(on_alarm, key=lambda one: "=" in one):
        name, equals, action = value.rpartition("=")
        if action not in ACTIONS or (equals and name not in names):
            near = did_you_mean(closest(name, names)) if equals and name not in names else ""
            raise ConfigError(
                f"{value!r} is neither log, stop nor NAME=log or NAME=stop",
                where="--on-alarm",
                hint=f"{near} monitors are {', '.join(names)}".lstrip(),
            )
        found |= {name: action == "stop"} if equals else dict.fromkeys(names, action == "stop")
    return found


def usual_monitors(
    on_alarm: Sequence[str] = (), judges: Sequence[str] = (), *, compares: bool = False
) -> tuple[Monitor, ...]:
    """A new one of each, and one per judge: the names of rewards of weight 0. An algorithm that ``compares`` the
    completions of a prompt, as GRPO does, needs rewards that differ within groups."""
    stops = actions(on_alarm)
    gaps: list[Monitor] = [JudgeGap(judge=judge, stop=stops[JUDGE_GAP]) for judge in judges]
    names = [name for name in MONITORS if compares or name != FLAT]
    return (*(MONITORS[name](stop=stops[name]) for name in names), *gaps)
