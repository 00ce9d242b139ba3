"""The program of :class:`tether.rewards.grader.Grader`, which runs in a process of its own.

    python grader_main.py SECONDS

It reads lines, each a list of texts in JSON: first its task (:func:`answerer`), then questions. It replies to each by
a line, ``{"value": true}`` or ``{"error": "..."}``. It ends with its input, and where it computes for twice SECONDS,
which happens only where no process is left to end it.

It reads what a model wrote, and imports neither tether nor torch.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

MEMORY = 4 * 2**30
"""Bytes of address space; an expression that needs more is a MemoryError in place of a machine without memory."""

Answerer = Callable[..., bool]

_FENCED = re.compile(r"^```[^\n`]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def answerer(kind: str, *arguments: str) -> Answerer:
    """What answers questions of a kind: ``fullmatch PATTERN``, ``search PATTERN``, ``schema SCHEMA`` or ``math``."""
    match kind:
        case "fullmatch" | "search":
            return matches(kind, *arguments)
        case "schema":
            return valid(*arguments)
        case "math":
            return equal()
    raise ValueError(f"no such task: {kind}")


def matches(how: str, pattern: str) -> Answerer:
    """Whether all of a text matches the pattern, or any part of it; ``.`` matches line breaks too."""
    compiled = re.compile(pattern, re.DOTALL)
    found = compiled.fullmatch if how == "fullmatch" else compiled.search
    return lambda text: found(text) is not None


def valid(schema: str) -> Answerer:
    """Whether a text, or else the last block that it fences by ```` ``` ````, is JSON that the schema allows.

    References to other documents are not followed.
    """
    from jsonschema.validators import validator_for
    from referencing import Registry

    parsed = json.loads(schema)
    validator = validator_for(parsed)(parsed, registry=Registry())

    def answer(text: str) -> bool:
        for source in (text, *_FENCED.findall(text)[-1:]):
            try:
                value = json.loads(source, parse_constant=_refuse)
            except (ValueError, RecursionError):
                continue
            return bool(validator.is_valid(value))
        return False

    return answer


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def equal() -> Answerer:
    """Of a gold answer alone, whether math-verify can parse it; of a gold answer and another, whether it can show that
    they are equal."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    @lru_cache(maxsize=256)
    def parsed(text: str) -> list[Any]:
        return list(parse(text, targets, parsing_timeout=None))

    def answer(gold: str, *other: str) -> bool:
        if not other:  # what it cannot parse, it returns as text
            return any(not isinstance(one, str) for one in parsed(gold))
        return verify(parsed(gold), parsed(*other), timeout_seconds=None)

    answer(r"\boxed{\frac{x}{2}}", r"\boxed{x + 1}")  # the first use builds tables, which is at no question's cost
    return answer


def limit_memory() -> None:
    if sys.platform == "linux":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        soft = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def alarm(seconds: float) -> None:
    """End this process in so many seconds, whatever it does then; 0 for no more."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def main(seconds: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a library prints is no reply
    limit_memory()

    def reply(**what: object) -> None:
        print(json.dumps(what), file=replies, flush=True)

    try:
        answer = answerer(*json.loads(sys.stdin.buffer.readline()))
    except Exception as error:
        return reply(error=f"{type(error).__name__}: {error}")
    reply(value=True)
    for line in sys.stdin.buffer:
        alarm(2 * float(seconds))
        try:
            value = answer(*json.loads(line))
        except Exception as error:
            reply(error=f"{type(error).__name__}: {error}")
        else:
            reply(value=value)
        alarm(0)
    return None


if __name__ == "__main__":
    main(*sys.argv[1:])
