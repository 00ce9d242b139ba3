"""A Python function as a labeller.

    def prefer(prompts, first, second) -> list[str]

It is called once, with flat lists of one entry per pair: text, or lists of messages where the prompts are. It returns
"first", "second", "tie" or "skip" for each, and may be async. It is supervised as a reward is
(:mod:`tether.rewards.supervision`).
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from tether.errors import RewardError
from tether.event_loop import awaited
from tether.labellers.labels import Label, Pair, checked
from tether.rewards.function import place_of
from tether.rewards.process import Apart
from tether.rewards.supervision import supervised
from tether.stop_requests import DeadlineError, Interrupted
from tether.untrusted import shown


@dataclass(frozen=True, kw_only=True)
class FunctionLabeller:
    """A :class:`tether.labellers.labels.Labeller` that calls ``function``; see :class:`FunctionReward` for the rest."""

    name: str
    function: Callable[..., Any]
    deadline: float | None = None
    retries: int = 0
    apart: Apart = field(default_factory=Apart, compare=False)
    """What the function sets for the whole process, in force while it runs."""

    def label(self, pairs: Sequence[Pair]) -> list[Label]:
        with self.apart.inside():
            return supervised(
                self.name, lambda: self._call(pairs), deadline=self.deadline, retries=self.retries, kind="labeller"
            )

    def _call(self, pairs: Sequence[Pair]) -> list[Label]:
        texts = [pair.texts for pair in pairs]
        columns = {f"{name}s" if name == "prompt" else name: [one[name] for one in texts] for name in texts[0]}
        try:
            returned = self.function(**columns)
            if inspect.isawaitable(returned):
                returned = awaited(returned)
            if isinstance(returned, Mapping | Set | str | bytes):
                raise TypeError(f"it returned {type(returned).__name__}, not a list of labels")
            found = list(itertools.islice(iter(returned), len(pairs) + 1))  # a generator may never end
        except (RewardError, DeadlineError, Interrupted, KeyboardInterrupt):
            raise
        except BaseException as error:  # SystemExit too: one line, with the cause chained
            raise RewardError(
                f"labeller {self.name!r} raised {type(error).__name__}: {shown(error, str)}{place_of(error)}"
            ) from error
        return checked(found, pairs, name=self.name)
