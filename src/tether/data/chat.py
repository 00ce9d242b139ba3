"""What a command says of conversations: their chat template, its variables, and a system turn."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tether.data.conversations import MODEL, is_conversation, template_of
from tether.data.reading import Row, RowError
from tether.errors import ConfigError
from tether.names import closest, did_you_mean

FIRST = ("prompt", "messages", "text", "chosen", "rejected")
"""Columns whose conversations begin one; a completion continues one."""
SYSTEM = ("system", "developer")
"""Roles of a turn that says how the model is to behave."""


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Conversations."""

    chat_template: str | None = None
    """Chat template in place of the tokenizer's: a Jinja file, or the name of one of the tokenizer's templates. It is
    saved with the model."""
    chat_template_kwargs: str | None = None
    """Variables of the chat template as a JSON object, such as {"enable_thinking": false}; those of a row's column of
    this name come first."""
    system: str | None = None
    """System turn of conversations that have none."""

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        ConfigError.unless(self, {"system must hold text": self.system is None or bool(self.system.strip())})
        self.options  # noqa: B018 - what is wrong is an error now

    @functools.cached_property
    def options(self) -> Mapping[str, Any]:
        """The variables of the template."""
        if self.chat_template_kwargs is None:
            return {}
        try:
            found = json.loads(self.chat_template_kwargs)
            return template_of({"chat_template_kwargs": found}).options
        except RowError as error:
            raise ConfigError(str(error), where="--chat-template-kwargs") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"not valid JSON: {self.chat_template_kwargs!r:.80}",
                where="--chat-template-kwargs",
                hint="""give an object, such as '{"enable_thinking": false}'""",
            ) from error

    def applied(self, row: Row) -> Row:
        """The row with the variables and the system turn. Raises :class:`RowError` for a system turn where there is no
        conversation."""
        values = row.values
        if options := self.options:
            own = template_of(values).options
            values = {**values, "chat_template_kwargs": {**options, **own}}
        if self.system is not None:
            conversations: dict[str, Any] = {name: values[name] for name in FIRST if is_conversation(values.get(name))}
            begun = {
                name: with_system(turns, self.system)
                for name, turns in conversations.items()
                if turns[0]["role"] not in MODEL
            }
            if not begun:
                raise RowError("no conversation", "is plain text, which has no system turn (--system)")
            values = {**values, **begun}
        return row if values is row.values else replace(row, values=values)


def as_turns(row: Row) -> Row:
    """A row with a prompt of plain text as turns of a conversation."""
    values = row.values
    if not isinstance(values.get("prompt"), str):
        return row
    roles = {"prompt": "user", **dict.fromkeys(("completion", "chosen", "rejected"), "assistant")}
    turns = {
        name: [{"role": role, "content": values[name]}]
        for name, role in roles.items()
        if isinstance(values.get(name), str)
    }
    return replace(row, values={**values, **turns})


def with_system(turns: Any, text: str) -> list[Any]:
    """The conversation with a system turn in front, unless it has one."""
    return list(turns) if turns[0]["role"] in SYSTEM else [{"role": "system", "content": text}, *turns]


def choose_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> None:
    """Give ``tokenizer`` the chat template in the file ``name``, or the one of its own that is called so. Raises
    :class:`ConfigError`."""
    if name is None:
        return
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, Mapping) else {}
    if name in own:
        tokenizer.chat_template = {**own, "default": own[name]}
        return
    try:
        tokenizer.chat_template = Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if own:
            hint = f"{did_you_mean(closest(name, list(own)))} the tokenizer has the templates {', '.join(own)}".strip()
        else:
            hint = "give a Jinja file; the tokenizer has no templates with names"
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ConfigError(f"{name} cannot be read ({reason})", where="--chat-template", hint=hint) from error
