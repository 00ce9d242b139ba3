"""Durations as people write them."""

from __future__ import annotations

import re

from tether.errors import ConfigError

LONGEST = 100 * 365 * 86400.0
"""In seconds. A clock cannot wait for three centuries."""

_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_DURATION = re.compile(
    r"(?:(?P<d>\d+(?:\.\d+)?)d)?(?:(?P<h>\d+(?:\.\d+)?)h)?(?:(?P<m>\d+(?:\.\d+)?)m)?(?:(?P<s>\d+(?:\.\d+)?)s?)?"
)


def seconds(text: str, *, name: str) -> float:
    """Seconds of ``3h55m``, ``90s``, ``1.5h``, or a number of seconds. ``name`` is the option's, for
    the :class:`ConfigError`.

    >>> seconds("3h55m", name="stop_after")
    14100.0
    """
    match = _DURATION.fullmatch(text.strip())
    found = {unit: number for unit, number in match.groupdict().items() if number} if match else {}
    total = sum(float(number) * _UNITS[unit] for unit, number in found.items())
    if not 0 < total <= LONGEST:
        bound = "above 0" if total <= 0 else "of at most a century"
        raise ConfigError(
            f"{name} must be a time {bound}, such as 3h55m, 90s or a number of seconds, found {text[:80]!r}"
        )
    return total


def in_words(seconds: float) -> str:
    """A duration to two digits or so.

    >>> [in_words(n) for n in (0.2, 41, 754, 14100, 180000)]
    ['0 s', '41 s', '13 min', '3.9 h', '2.1 d']
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 36 * 3600 else f"{seconds / 86400:.1f} d"
