"""The errors a person can act on. Each becomes one line on the terminal and an exit code, never a traceback."""

from __future__ import annotations

from collections.abc import Mapping


class TetherError(Exception):
    """Something outside the program is wrong: ``message`` says what, ``where`` it is, and ``hint`` what to do.

    ``str(error)`` is the one line ``where: message; hint``. Code that an error passes through may add to it
    (:meth:`at`, :meth:`advise`) and raise it again; it never builds a new error from an old one's text.
    """

    exit_code = 2

    def __init__(self, message: str, *, where: object = "", hint: str = "") -> None:
        super().__init__(message)
        self.message, self.where, self.hint = message, str(where), hint

    def at(self, where: object) -> None:
        """Say where it happened: a place that holds the one the error names, such as the step of a file."""
        place = str(where)
        if not self.where.startswith(place):
            self.where = f"{place}: {self.where}" if self.where else place

    def advise(self, hint: str) -> None:
        """Add one more thing to do."""
        self.hint = "; ".join(filter(None, [self.hint, hint]))

    def __str__(self) -> str:
        located = f"{self.where}: {self.message}" if self.where else self.message
        return f"{located}; {self.hint}" if self.hint else located


class ConfigError(TetherError):
    """An option or a combination of options that cannot work."""

    @staticmethod
    def unless(checks: Mapping[str, bool]) -> None:
        """Raise for the first message whose check is False."""
        for message, holds in checks.items():
            if not holds:
                raise ConfigError(message)


class DataError(TetherError):
    """A data file that is missing, malformed or holds a row that cannot be used."""


class ModelError(TetherError):
    """A model or tokenizer that cannot be loaded, does not fit, or does not survive a save."""


class RewardError(TetherError):
    """A reward that cannot be loaded or that failed; a failed reward is never a zero."""


class RunError(TetherError):
    """A run directory that cannot be used."""


class MemoryShortError(TetherError):
    """What has to be computed does not fit into memory, in however small pieces."""


class GuardError(TetherError):
    """A guard or an alarm stopped the run: a quantity that must be finite was not, or a limit was passed."""

    exit_code = 3
