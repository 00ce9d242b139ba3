"""What a run reads, so that it can be resumed from anywhere and at any time: absolute paths, and a fixed date.

What an input holds decides whether it is the one that the run began with, not where it is.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tether.environments.generated import is_generated
from tether.errors import ConfigError, ModelError
from tether.models.loading import BASE
from tether.rewards.resolve import is_address, judge_file, short_name, split_name, split_weight
from tether.rewards.rules import RULES, TAKES_FILE
from tether.runtime.changes import CONTENT_DECIDES, REWARDS
from tether.runtime.directory import CONFIG

DATE = "template date"
"""Among the fingerprints of a run: the time that chat templates are given, where one asks for it."""
_FORMAT = re.compile(r"""(["'])((?:(?!\1).)*%(?:(?!\1).)*)\1""", re.DOTALL)


def absolute(value: str, base: Path) -> str:
    """The path of a local model or data set, ``DIRECTORY:SPLIT`` included; a hub id or ``base`` as it is."""
    if value == BASE or not value or is_generated(value):
        return value
    if os.path.exists(base / value):  # which, unlike the path, takes a name that is too long for one of no file
        return str(base / value)
    directory, colon, split = value.partition(":")
    return f"{base / directory}{colon}{split}" if colon and os.path.isdir(base / directory) else value


def absolute_object(spec: str, base: Path) -> str:
    """``file.py:name`` with the path of the file; anything else as it is."""
    file, _, name = spec.rpartition(":")
    return f"{base / file}:{name}" if file.endswith(".py") else spec


def absolute_reward(value: str, base: Path) -> str:
    """A ``--reward`` value with the path of its model or of its file, if it has one."""
    name, rest = split_name(value)
    spec, _ = split_weight(rest)
    front, back = "" if name is None else f"{name}:=", rest[len(spec) :]
    rule, _, argument = spec.partition(":")
    if rule in TAKES_FILE:
        return f"{front}{rule}:{base / argument}{back}" if argument else value
    if rule in RULES or is_address(spec):
        return value
    if judge := judge_file(spec):
        return f"{front}judge:{base / judge}{back}"
    if ":" in spec:
        return f"{front}{absolute_object(spec, base)}{back}"
    return f"{front}{absolute(spec, base)}{back}"


def absolute_rewards(values: Sequence[str], base: Path) -> list[str]:
    """All ``--reward`` values with :func:`absolute_reward`, but for those that are reported by their SPEC as it was
    given, because they have no NAME and share a short name."""
    named = [split_name(value) for value in values]
    short = ["" if name else short_name(split_weight(rest)[0]) for name, rest in named]
    return [
        value if one and short.count(one) > 1 else absolute_reward(value, base)
        for value, one in zip(values, short, strict=True)
    ]


def located(options: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """``options`` with absolute paths of the run directory and of all inputs, which are relative to ``base``."""
    found = dict(options)
    if isinstance(found.get("out"), str):
        found["out"] = str(base / found["out"])
    for name in CONTENT_DECIDES & found.keys():
        if isinstance(found[name], str):
            found[name] = absolute(found[name], base)
    if isinstance(found.get("env"), str):
        found["env"] = absolute_object(found["env"], base)
    for name in REWARDS:
        if isinstance(found.get(name), Sequence):
            found[name] = absolute_rewards(found[name], base)
    return found


def here() -> Path:
    """The working directory. Raises :class:`ConfigError` where it has been removed."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        raise ConfigError("the working directory does not exist any more", hint="change to another one") from None


@contextlib.contextmanager
def naming_the_model_of_a_run() -> Iterator[None]:
    """Where a run directory was given in place of a model, the :class:`ModelError` says which model it holds."""
    try:
        yield
    except ModelError as error:
        run = Path(error.where)
        if (run / CONFIG).is_file() and not (run / "config.json").is_file():
            models = [path for path in [run / "model", *sorted(run.glob("*/model"))] if path.is_dir()]
            name = f"name its model, {models[0]}" if models else "the run has no model yet"
            error.advise(f"this is a run directory; {name}")
        raise


def asks_for_the_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template of the tokenizer can print the date."""
    templates = tokenizer.chat_template
    texts = templates.values() if isinstance(templates, Mapping) else [templates]
    return any("strftime_now" in text for text in texts if isinstance(text, str))


def fix_the_date(tokenizer: PreTrainedTokenizerBase, date: str) -> None:
    """From now on chat templates of this tokenizer are given the time ``date``, in ISO format, as the present one.

    Otherwise a run that is resumed on another day would read other tokens than an uninterrupted one.
    """
    moment, apply = datetime.fromisoformat(date), tokenizer.apply_chat_template

    def apply_at_moment(
        conversation: Any, tools: Any = None, documents: Any = None, chat_template: str | None = None, **kwargs: Any
    ) -> Any:
        template = at_moment(tokenizer.get_chat_template(chat_template, tools), moment)
        return apply(conversation, tools, documents, template, **kwargs)

    tokenizer.apply_chat_template = apply_at_moment  # type: ignore[method-assign, assignment]


def at_moment(template: str, moment: datetime) -> str:
    """``template`` with a ``strftime_now`` of its own, for the formats that the template holds.

    Functions cannot be given to a template, so what each format comes to is written into it.
    """
    formats = {text: moment.strftime(text) for _, text in _FORMAT.findall(template)}
    return (
        f"{{% macro strftime_now(format) %}}{{{{ ({formats!r})[format] if format in {list(formats)!r} "
        "else raise_exception('a date in a format that is not written in the template') }}{% endmacro %}"
        "{{ '' }}"  # a block would take a line break after it away
        f"{template}"
    )
