"""A program as a labeller: JSON lines in, JSON lines out.

It reads one ``{"id", "prompt", "first", "second"}`` per pair on its standard input, to the end, and writes one
``{"id", "label"}`` per pair on its standard output, in any order. It is started without a shell.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tether.errors import RewardError
from tether.labellers.labels import Label, Pair, checked
from tether.rewards.supervision import supervised
from tether.untrusted import one_line, shown


@dataclass(frozen=True, kw_only=True)
class ProgramLabeller:
    """A :class:`tether.labellers.labels.Labeller` that runs ``arguments``. A run fails when it cannot be started, exits
    with another status than 0, takes longer than ``deadline`` seconds or writes anything but one label per pair."""

    name: str
    arguments: tuple[str, ...]
    deadline: float | None = None
    retries: int = 0

    def label(self, pairs: Sequence[Pair]) -> list[Label]:
        return supervised(
            self.name, lambda: self._run(pairs), deadline=self.deadline, retries=self.retries, kind="labeller"
        )

    def _run(self, pairs: Sequence[Pair]) -> list[Label]:
        asked = "".join(json.dumps({"id": number, **pair.texts}) + "\n" for number, pair in enumerate(pairs))
        try:
            done = subprocess.run(  # noqa: S603 - the program that the person named
                self.arguments, input=asked.encode(), capture_output=True, check=False
            )
        except (OSError, ValueError) as error:
            raise RewardError(f"labeller {self.name!r} cannot be started: {one_line(str(error))}") from error
        if done.returncode:
            said = one_line(done.stderr.decode(errors="replace")[-500:])
            raise RewardError(f"labeller {self.name!r} ended with status {done.returncode}: {said or 'no message'}")
        return checked(self._in_order(done.stdout, len(pairs)), pairs, name=self.name)

    def _in_order(self, written: bytes, count: int) -> list[Any]:
        """The labels in the order of the pairs, from lines in any order."""
        found: dict[int, Any] = {}
        for number, line in enumerate(written.splitlines(), start=1):
            where = f"line {number} of labeller {self.name!r}"
            try:
                row = json.loads(line)
                key, label = row["id"], row["label"]
            except (ValueError, RecursionError, TypeError, KeyError):
                raise RewardError(f'is no object with "id" and "label": {shown(line)}', where=where) from None
            if type(key) is not int or not 0 <= key < count:
                raise RewardError(f"has the id {shown(key)}, which no pair has", where=where)
            if key in found:
                raise RewardError(f"has the id {key} for the second time", where=where)
            found[key] = label
        missing = [key for key in range(count) if key not in found]
        if missing:
            raise RewardError(f"labeller {self.name!r} gave no label for {len(missing)} pairs, such as id {missing[0]}")
        return [found[key] for key in range(count)]
