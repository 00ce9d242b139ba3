"""The run directory of a call from Python: the caller's, or a temporary one."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tether.api.arguments import resumed_by
from tether.api.result import Run
from tether.errors import ConfigError
from tether.runtime.directory import CONFIG
from tether.stop_requests import Interrupted


class CallDirectory:
    """As a context manager it says of an interrupted call how it is resumed, and removes a temporary directory that
    nothing can be resumed from. One that can be resumed is kept until Python ends."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        out = arguments.get("out")
        if out is None and arguments.get("resume"):
            raise ConfigError("there is no run to resume without out", hint="give out=, the directory of the run")
        if not isinstance(out, str | os.PathLike | None):
            raise ConfigError(f"found {out!r}", where="out", hint="give the path of the run directory")
        self.temporary = out is None
        self.path = Path(tempfile.mkdtemp(prefix="tether-") if out is None else out)
        self.again = "the same call and resume=True"
        """What takes the place of ``tether resume``."""
        if out is None:
            self.again = (
                f"the same call, out={str(self.path)!r} and resume=True; the directory is removed when Python ends"
            )

    def result(self) -> Run:
        """What the run has left."""
        return Run(self.path, temporary=self.temporary)

    def __enter__(self) -> CallDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None:
            return
        resumable = (self.path / CONFIG).is_file()
        if self.temporary and resumable:
            atexit.register(shutil.rmtree, self.path, ignore_errors=True)
        elif self.temporary:
            shutil.rmtree(self.path, ignore_errors=True)
        if isinstance(error, Interrupted):
            raise Interrupted(resumed_by(self.again, str(error))) from None
        if isinstance(error, KeyboardInterrupt):
            way = f"resume from its last checkpoint with {self.again}" if resumable else "nothing was saved yet"
            raise Interrupted(f"stopped at once; {way}") from None
