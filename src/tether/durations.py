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
