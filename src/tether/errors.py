"""The errors a person can act on. Each becomes one line on the terminal and an exit code, never a traceback."""

from __future__ import annotations

from collections.abc import Mapping


class TetherError(Exception):
    """Something outside the program is wrong; the message says what, where, and what to do."""

    exit_code = 2


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
    """A guard stopped the run: a quantity that must be finite was not, or a limit was passed."""

    exit_code = 3


class NotFiniteError(GuardError):
    """A loss, a gradient or another quantity is not finite."""
