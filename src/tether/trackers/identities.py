"""``trackers.json`` of a run directory: what each tracker calls the run, and the last step that it has."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tether.runtime.files import atomic_write
from tether.runtime.json_text import to_json

FILE = "trackers.json"
STEP = "step"


class Identities:
    """The file of one run; trackers write to it from threads of their own. It holds no key and no password."""

    def __init__(self, directory: Path, *, resumed: bool) -> None:
        """A run that is not ``resumed`` is in no tracker yet."""
        self.path = directory / FILE
        self._found: dict[str, dict[str, Any]] = read(self.path) if resumed else {}
        self._lock = threading.Lock()

    def identity(self, tracker: str) -> dict[str, str]:
        """What :meth:`tether.trackers.rows.Backend.start` returned when the run began; empty where it never did."""
        found = self._found.get(tracker, {})
        return {name: str(value) for name, value in found.items() if name != STEP}

    def step(self, tracker: str) -> int:
        """The last step that the tracker has; 0 where it has none."""
        found = self._found.get(tracker, {}).get(STEP)
        return found if isinstance(found, int) else 0

    def keep(self, tracker: str, identity: Mapping[str, str], step: int) -> None:
        """Write both down."""
        with self._lock:
            self._found[tracker] = {**identity, STEP: step}
            with atomic_write(self.path) as partial:
                partial.write_text(to_json(self._found, indent=2, ascii_only=True), encoding="utf-8")


def read(path: Path) -> dict[str, dict[str, Any]]:
    """What the file holds; nothing where it cannot be read, and the trackers then begin a new run."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {name: one for name, one in found.items() if isinstance(one, dict)} if isinstance(found, dict) else {}
