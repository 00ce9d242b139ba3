"""Conversations as data sets hold them, read into turns that a chat template can format."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tether.data.reading import RowError
from tether.types import Message

MODEL = {"assistant", "model", "gpt", "bot", "chatbot", "ai"}
"""Names of the model's role."""
OTHERS = {"user", "human", "system", "developer", "tool", "function", "ipython", "environment"}
"""Roles whose turns are never the model's."""
MAY_BE_EMPTY = {"system", "developer", "tool", "function", "ipython"}
"""Roles that may have nothing to say."""
RESERVED = {
    "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "padding",
    "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
    "sanitize_control_tokens", "messages",
}  # fmt: skip
"""Arguments of the rendering that a row's ``chat_template_kwargs`` cannot set."""

_WRITTEN_OUT = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")


@dataclass(frozen=True)
class Template:
    """What a row gives to the chat template besides its turns."""

    tools: Sequence[Any] | None = None
    """The functions that may be called, as JSON schemas."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the template, such as ``enable_thinking``."""


PLAIN = Template()


def is_conversation(value: Any) -> bool:
    """Whether ``value`` is a non-empty list of turns: objects with a role, and text, parts of text, tool calls, or
    nothing as their content."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(m, Mapping) and isinstance(m.get("role"), str) and _has_content(m) for m in value)
    )


def read_turns(value: Sequence[Mapping[str, Any]], column: str) -> list[Message]:
    """The turns of a conversation (:func:`is_conversation`): content as text, without keys whose value is None.

    Arrow gives every turn the keys of all turns, and None where a turn has no such key. Raises :class:`RowError` for a
    turn of user or model without content, and for content that is not text.
    """
    return [_turn(message, column) for message in value]


def template_of(values: Mapping[str, Any]) -> Template:
    """The columns ``tools`` and ``chat_template_kwargs`` of a row; either may be JSON text. Raises
    :class:`RowError`."""
    tools, options = (_structure(values.get(name), name) for name in ("tools", "chat_template_kwargs"))
    if tools is None and options is None:
        return PLAIN
    if tools is not None and not (isinstance(tools, Sequence) and all(isinstance(tool, Mapping) for tool in tools)):
        raise RowError("wrong type", f"tools must be a list of JSON schemas, found {type(tools).__name__}")
    if options is not None and not isinstance(options, Mapping):
        raise RowError("wrong type", f"chat_template_kwargs must be an object, found {type(options).__name__}")
    options = {name: option for name, option in (options or {}).items() if option is not None}
    if wrong := sorted(RESERVED & options.keys()):
        raise RowError("wrong type", f"chat_template_kwargs must not hold {wrong[0]!r}, which the program sets")
    return Template([_without_none(tool) for tool in tools] if tools else None, options)


def is_written_out(text: str) -> bool:
    """Whether a text is a conversation as JSON, or as Python prints it, rather than something to say."""
    return _WRITTEN_OUT.match(text) is not None


def ends_with_model(messages: Sequence[Message]) -> bool:
    """Whether the last turn is the model's."""
    return messages[-1]["role"] in MODEL


def require_model_turn(message: Message, which: str) -> None:
    """Raise :class:`RowError` unless the turn, ``which`` as a person would call it, is the model's."""
    if message["role"] in OTHERS:
        raise RowError(
            "not the model's turn",
            f"{which} is the {message['role']}'s, and only turns of the model (assistant) can be learned",
        )


def joined(prompt: Sequence[Message], completion: Sequence[Message]) -> list[Message]:
    """Prompt and completion as one conversation. A prompt that ends with the model's turn has begun the completion's
    first one, which continues it."""
    if not ends_with_model(prompt):
        return [*prompt, *completion]
    begun, first, *more = prompt[-1], *completion
    if begun["role"] != first["role"]:
        raise RowError(
            "not the model's turn",
            f"the prompt ends with the {begun['role']}'s turn, which a {first['role']}'s turn cannot continue",
        )
    return [*prompt[:-1], {**begun, **first, "content": begun["content"] + first["content"]}, *more]


def _turn(message: Mapping[str, Any], column: str) -> dict[str, Any]:
    turn: dict[str, Any] = _without_none(message)
    turn["content"] = _content(turn.get("content", ""), column)
    silent = turn["role"] in MAY_BE_EMPTY or turn.get("tool_calls")
    if not silent and not turn["content"].strip():
        raise RowError("empty", f"{column} holds a turn without content")
    return turn


def _content(content: Any, column: str) -> str:
    """Text, or the text of a list of parts."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
            raise RowError("wrong type", f"{column} holds a part of type {kind!r}, and only text can be read")
        texts.append(text)
    return "".join(texts)


def _has_content(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    if content is None:  # an error of its own where the turn should say something
        return "content" in message or message["role"] in MAY_BE_EMPTY or bool(message.get("tool_calls"))
    parts = isinstance(content, Sequence) and all(isinstance(part, str | Mapping) for part in content)
    return isinstance(content, str) or parts


def _without_none(value: Any) -> Any:
    """``value`` without the keys of its objects whose value is None, at any depth."""
    if isinstance(value, Mapping):
        return {name: _without_none(inner) for name, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list | tuple) else value


def _structure(value: Any, column: str) -> Any:
    """A list or object, or one that is stored as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        raise RowError("wrong type", f"{column} is text and not valid JSON") from None
