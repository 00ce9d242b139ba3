"""Input from outside, made safe to use: text for a terminal, addresses for a log, YAML for options."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tether.errors import ConfigError

_USER = re.compile(r"(?<=:/)(/?)[^/\s'\"]*@")
_QUERY = re.compile(r"(:/[^\s'\"?]*\?)[^\s'\"]*[^\s'\":]")

LONGEST_LINE, LONGEST_VALUE = 2000, 500
"""Characters of an error, and of one value in it; the middle of a longer one is left out."""


def printable(text: str) -> str:
    """``text`` with unprintable characters escaped as in JSON.

    A terminal obeys control characters, and an unpaired surrogate cannot be written at all. A line of JSON stays the
    same JSON.

    >>> printable("\\x1b[31mred")
    '\\\\u001b[31mred'
    """
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def lines_printable(text: str) -> str:
    """``text`` made printable, with its line breaks."""
    return "\n".join(map(printable, text.split("\n")))


def one_line(text: str) -> str:
    """``text`` as one line for an error: printable, shortened, and without the secrets in its addresses."""
    return shortened(printable(redacted(" ".join(text.split()))), LONGEST_LINE)


def shortened(text: str, longest: int) -> str:
    """``text`` with dots for its middle where it has more than ``longest`` characters.

    >>> shortened("abcdefghijkl", 9)
    'abc...jkl'
    """
    end = (longest - 3) // 2
    return text if len(text) <= longest else f"{text[: longest - 3 - end]}...{text[-end:]}"


def shown(value: object, form: Callable[[Any], str] = repr) -> str:
    """``value`` as an error shows it: its ``repr``, or ``form``, shortened; its type where that raises."""
    try:
        text = form(value)
    except Exception:  # an integer of 5000 digits, an error whose __str__ raises
        text = f"<{type(value).__name__}>"
    return shortened(text, LONGEST_VALUE)


def redacted(text: str) -> str:
    """``text`` without the user and query of addresses, which may hold a password or a signature.

    >>> redacted("https://me:secret@host/file?token=secret: no such file")
    'https://***@host/file?***: no such file'
    """
    return _QUERY.sub(r"\1***", _USER.sub(r"\1***@", text))


def read_flat_yaml(path: Path) -> dict[str, Any]:
    """The ``name: value`` lines of a YAML file; a value is a scalar or a flat collection of them.

    References are refused, because a few lines of them can expand to gigabytes, and so are tags, because an option
    already has a type. Raises :class:`ConfigError`.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            line = event.start_mark.line + 1 if event.start_mark else 1
            if depth > 2 or isinstance(event, yaml.AliasEvent):
                what = "a reference" if isinstance(event, yaml.AliasEvent) else "a collection in a collection"
                raise ConfigError(f"{what}, and options are 'name: value' lines", where=f"{path}:{line}")
            if tag := getattr(event, "tag", None):
                raise ConfigError(f"not valid YAML for options (the tag {shown(tag)})", where=f"{path}:{line}")
        loaded = yaml.safe_load(text)
        str(loaded)  # Python reads longer integers than it writes, unless they are decimal
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror})", where=path) from None
    except UnicodeDecodeError:
        raise ConfigError("not a text file in UTF-8", where=path) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        raise ConfigError(f"not valid YAML ({getattr(error, 'problem', None) or error})", where=where) from None
    except (ValueError, OverflowError) as error:  # a 31st of June, a number of 5000 digits
        raise ConfigError(f"not valid YAML ({error})", where=path) from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError("must hold options as 'name: value' lines", where=path)
    return {str(key): value for key, value in loaded.items()}
