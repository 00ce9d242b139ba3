"""What judges have replied, by what they were asked: in memory, and in files that a later run reads."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tether.errors import RewardError

UNFINISHED = ".partial"
"""The end of the name of a file that is being written."""


@dataclass(frozen=True)
class Reply:
    """One that can be read, and the tokens that it took, with those of replies before it that could not."""

    text: str
    input_tokens: int = 0
    output_tokens: int = 0


def key_of(asked: Any) -> str:
    """The name of a reply: SHA-256 of what was asked, as JSON with sorted keys."""
    text = json.dumps(asked, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def at_once(write: Callable[[], None]) -> None:
    write()


@dataclass
class Replies:
    """The replies under ``directory``, and those of this process that are in no file."""

    directory: Path | None = None
    """None keeps them in memory alone."""
    keep: Callable[[Callable[[], None]], None] = at_once
    """Writes a file, now or once the run has a directory."""
    held: dict[str, Reply] = field(default_factory=dict)

    def find(self, key: str) -> Reply | None:
        """The reply, None where there is none, or its file is not whole."""
        if key in self.held or self.directory is None:
            return self.held.get(key)
        try:
            found = json.loads(file_of(self.directory, key).read_text(encoding="utf-8"))
            return Reply(str(found["text"]), int(found["input_tokens"]), int(found["output_tokens"]))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def add(self, key: str, reply: Reply) -> None:
        """Keep a reply."""
        self.held[key] = reply
        if self.directory is not None:
            self.keep(partial(self._write, self.directory, key))

    def _write(self, directory: Path, key: str) -> None:
        write_reply(directory, key, self.held[key])
        del self.held[key]


def file_of(directory: Path, key: str) -> Path:
    return directory / key[:2] / f"{key}.json"


def write_reply(directory: Path, key: str, reply: Reply) -> None:
    """The file of a reply, which appears whole or not at all."""
    file = file_of(directory, key)
    partly = file.with_name(f".{key}.{os.getpid()}{UNFINISHED}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partly.write_text(json.dumps(vars(reply)), encoding="utf-8")
        partly.replace(file)
    except OSError as error:
        raise RewardError(f"a reply cannot be written ({error.strerror})", where=directory) from error


def remove_unfinished(directory: Path) -> None:
    """Remove what a process that was killed left in a directory that no other one writes to."""
    for file in directory.glob(f"*/.*{UNFINISHED}"):
        file.unlink(missing_ok=True)
