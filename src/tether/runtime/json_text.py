"""JSON that every reader accepts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from typing import Any


def to_json(value: Any, *, indent: int | None = None, ascii_only: bool = False) -> str:
    """``value`` as JSON: null for a number that is not finite, the ``repr`` of what JSON does not know, such as a date.

    >>> to_json({"a": [1, float("nan")]})
    '{"a": [1, null]}'
    """
    write = partial(json.dumps, indent=indent, ensure_ascii=ascii_only, allow_nan=False, default=repr)
    try:
        return write(value)
    except ValueError:
        return write(finite(value))


def exact_json(value: Any, *, indent: int | None = None) -> str:
    """``value`` as JSON from which :func:`read_exact` makes it again: a number that is not finite is an object.

    >>> exact_json({"a": [1, float("inf")]})
    '{"a": [1, {"float": "inf"}]}'
    """
    return json.dumps(_marked(value), indent=indent, allow_nan=False)


def read_exact(text: str) -> Any:
    """What :func:`exact_json` was given."""
    return json.loads(text, object_hook=lambda found: float(found["float"]) if found.keys() == {"float"} else found)


def _marked(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if isinstance(value, Mapping):
        return {name: _marked(inner) for name, inner in value.items()}
    return [_marked(inner) for inner in value] if isinstance(value, list | tuple) else value


def finite(value: Any) -> Any:
    """``value`` with None for every number in it that is not finite, however deep."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_key(name): finite(inner) for name, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _key(name: Any) -> Any:
    return repr(name) if isinstance(name, float) else name
