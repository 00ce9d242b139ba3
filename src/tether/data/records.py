"""Typed records from rows: prompts, preference pairs, demonstrations. Every row is checked before any is used."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from tether.data.checks import DataReport, OnBadRows
from tether.data.columns import missing
from tether.data.conversations import (
    PLAIN,
    Template,
    ends_with_model,
    is_conversation,
    is_written_out,
    read_turns,
    require_model_turn,
    template_of,
)
from tether.data.drafts import learn_all, learn_completion, some, with_prompt, without_prompt
from tether.data.encoding import Encoder
from tether.data.loading import NONE, Draft, Kind, Overlong, load_records, unchanged
from tether.data.memory import source_of
from tether.data.reading import Row, RowError
from tether.data.shortening import shortening, shorter_prompt
from tether.data.texts import REPEATED
from tether.data.tokenise import (
    Text,
    cut_left,
    special_front,
    write_continuation,
    write_prompt,
    write_whole,
)
from tether.types import Demonstration, PreferencePair, Prompt

__all__ = ["Overlong", "load_demonstrations", "load_pairs", "load_prompts"]

WRITTEN_OUT, CHANGED = "conversation stored as text: used as text", "completion changed by the chat template"
TWICE, BEGINS = "prompt repeated: removed", "begins with its short prompt: used as it is"
"""Kinds of findings in rows that are used."""


def load_prompts(
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    max_new_tokens: int,
    overlong: Overlong = "fail",
    on_bad_rows: OnBadRows = "fail",
    report: DataReport | None = None,
    unembedded: Mapping[int, str] = NONE,
    each: Callable[[Row], Row] = unchanged,
) -> list[Prompt]:
    """Rows with a ``prompt`` (text or conversation); the other columns go to the reward functions.

    ``source`` is a file, a directory or a hub id, or rows in memory: a list of strings, conversations or dicts, a dict
    of lists, a DataFrame, a data set (:func:`tether.data.memory.source_of`).

    A prompt and its ``max_new_tokens`` must fit the ``context`` of the model, in tokens. A prompt cut on the left keeps
    its leading special token (BOS); its ``text`` is that of the kept tokens, its ``messages`` are not cut.

    A row that comes to an id of ``unembedded`` cannot be used: the tokens, by id, for which the model has no embedding
    (:func:`tether.models.loading.unembedded`). ``each`` changes a row before it is read.

    Findings go to ``report``. Raises :class:`DataError` that names the first row that cannot be used and counts the
    others; for ``skip`` and ``drop``, only if no row is left.
    """

    shorten = shortening(tokenizer, context, overlong)

    def parse(row: Row) -> Draft[Prompt]:
        prompt = _text(row, "prompt")
        columns = {name: value for name, value in row.values.items() if name != "prompt"}
        given = write_prompt(tokenizer, prompt, _template(row, prompt))
        written = given._replace(text=shorten(given.text))
        messages = None if isinstance(prompt, str) else tuple(prompt)

        def build(encoder: Encoder) -> Prompt:
            ids = some("prompt", encoder(written))
            return Prompt(ids=ids, text=written.text, messages=messages, columns=columns)

        return Draft((written,), build, _written_out(prompt), shortened=written != given)

    def cut(prompt: Prompt) -> Prompt | None:
        ids = cut_left(tokenizer, prompt.ids, context - max_new_tokens)
        if ids is None:
            return None
        begin = special_front(tokenizer, ids) if prompt.messages is None else 0  # as in a prompt that is not cut
        return replace(prompt, ids=ids, text=str(tokenizer.decode(list(ids[begin:]))))

    kind = Kind(
        parse,
        lambda prompt: len(prompt.ids) + max_new_tokens,
        cut,
        of=f"prompt and {max_new_tokens} new tokens",
        context=context,
        overlong=overlong,
        unembedded=unembedded,
    )
    rows = source_of(source, name="prompts", text_column="prompt", turns_column="prompt")
    return load_records(rows, tokenizer, kind, on_bad_rows=on_bad_rows, report=report, each=each)


def load_pairs(
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    overlong: Overlong = "fail",
    on_bad_rows: OnBadRows = "fail",
    report: DataReport | None = None,
    unembedded: Mapping[int, str] = NONE,
    each: Callable[[Row], Row] = unchanged,
) -> list[PreferencePair]:
    """Rows with ``chosen`` and ``rejected``, and optionally ``prompt`` and ``margin``.

    Where there is no ``prompt``, or where both sides contain it, the prompt is implicit: the token ids that both sides
    begin with, which may be none. Otherwise as :func:`load_prompts`; the sides are never cut.
    """

    shorten = shortening(tokenizer, context, overlong)

    def parse(row: Row) -> Draft[PreferencePair]:
        chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
        if chosen == rejected:
            raise RowError("equal sides", "chosen and rejected are equal, so the pair states no preference")
        margin, template = _margin(row), _template(row, chosen)
        prompt = _text(row, "prompt") if row.values.get("prompt") is not None else None
        notes = _written_out(chosen)
        if prompt is not None and not (_holds(chosen, prompt) and _holds(rejected, prompt)):
            (chosen, rejected), found = _once(prompt, {"chosen": chosen, "rejected": rejected})
            given = [write_continuation(tokenizer, prompt, side, template) for side in (chosen, rejected)]
            notes += found + (_changed(chosen, given[0].tail) or _changed(rejected, given[1].tail))
            return with_prompt(given, shorten, margin, notes)
        first, second = (write_whole(tokenizer, side, template) for side in (chosen, rejected))
        notes += _changed(chosen, first.text) or _changed(rejected, second.text)
        return without_prompt((first, second), shorten, margin, notes)

    def sides(pair: PreferencePair) -> int:
        return max(len(pair.chosen_ids), len(pair.rejected_ids))

    def cut(pair: PreferencePair) -> PreferencePair | None:
        ids = cut_left(tokenizer, pair.prompt_ids, context - sides(pair))
        return None if ids is None else replace(pair, prompt_ids=ids)

    kind = Kind(
        parse,
        lambda pair: len(pair.prompt_ids) + sides(pair),
        cut,
        of="prompt and longer side",
        context=context,
        overlong=overlong,
        unembedded=unembedded,
    )
    rows = source_of(source, name="pairs")
    return load_records(rows, tokenizer, kind, on_bad_rows=on_bad_rows, report=report, each=each)


def load_demonstrations(
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    overlong: Overlong = "fail",
    on_bad_rows: OnBadRows = "fail",
    report: DataReport | None = None,
    unembedded: Mapping[int, str] = NONE,
    each: Callable[[Row], Row] = unchanged,
) -> list[Demonstration]:
    """Rows with ``prompt`` and ``completion``, ``messages`` (the last turn is the completion) or ``text``.

    Otherwise as :func:`load_prompts`; a completion, or a text, is never cut.
    """

    shorten = shortening(tokenizer, context, overlong)

    def parse(row: Row) -> Draft[Demonstration]:
        if _among(row, "messages", before=("completion",)):
            prompt, completion = _last_turn(_text(row, "messages"))
        elif _among(row, "prompt", "completion"):
            prompt, completion = _text(row, "prompt"), _text(row, "completion")
        else:
            text = _text(row, "text", instead="'text', or 'prompt' and 'completion'")
            whole = write_whole(tokenizer, text, _template(row, text))
            return Draft((whole,), partial(learn_all, whole), _written_out(text), never_cut=(whole.text,))
        notes = _written_out(completion)
        if _holds(completion, prompt):
            prompt, completion = _last_turn(completion)
        (completion,), found = _once(prompt, {"completion": completion})
        given = write_continuation(tokenizer, prompt, completion, _template(row, completion))
        notes += found + _changed(completion, given.tail)
        written = shorter_prompt(given, shorten)
        return Draft(
            tuple(written),
            partial(learn_completion, written),
            notes,
            never_cut=(written.tail,),
            shortened=written != given,
        )

    def cut(one: Demonstration) -> Demonstration | None:
        ids = cut_left(tokenizer, one.prompt_ids, context - len(one.completion_ids))
        return None if ids is None else replace(one, prompt_ids=ids)

    kind = Kind(
        parse,
        lambda one: len(one.prompt_ids) + len(one.completion_ids),
        cut,
        of="prompt and completion",
        context=context,
        overlong=overlong,
        unembedded=unembedded,
    )
    rows = source_of(source, name="demonstrations", text_column="text", turns_column="messages")
    return load_records(rows, tokenizer, kind, on_bad_rows=on_bad_rows, report=report, each=each)


# ------------------------------------------------------------------------------------------------ what a row holds


def _among(row: Row, *columns: str, before: Sequence[str] = ()) -> bool:
    """Whether the row has one of ``columns``, and none of those that come ``before`` it."""
    return any(row.values.get(name) is not None for name in columns) and not any(
        row.values.get(name) is not None for name in before
    )


def _text(row: Row, column: str, *, instead: str | None = None) -> Text:
    """The column's text or conversation. Raises :class:`RowError`."""
    if column not in row.values:
        raise missing(instead or repr(column), row)
    value = row.values[column]
    if isinstance(value, str):
        if not value.strip():
            raise RowError("empty", f"{column} is empty")
        return value
    if not is_conversation(value):
        found = type(value).__name__
        raise RowError("wrong type", f"{column} must be text or a list of {{role, content}}, found {found}")
    return read_turns(value, column)


def _template(row: Row, text: Text) -> Template:
    """What the row gives to the chat template; plain text has none."""
    return PLAIN if isinstance(text, str) else template_of(row.values)


def _last_turn(messages: Text) -> tuple[Text, Text]:
    """A conversation's prompt, and the turn to learn."""
    if isinstance(messages, str) or len(messages) < 2:
        raise RowError("wrong type", "messages must hold at least two turns, the last one to imitate")
    require_model_turn(messages[-1], "the last turn")
    if ends_with_model(messages[:-1]):
        raise RowError("not the model's turn", "the last two turns are both the model's; join them, or leave one out")
    return messages[:-1], messages[-1:]


def _margin(row: Row) -> float:
    """The row's margin, 0 where it has none."""
    margin = row.values.get("margin")
    if margin is None:
        return 0.0
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not _finite(margin):
        raise RowError("wrong type", f"margin must be a finite number, found {reprlib.repr(margin)}")
    return float(margin)


def _finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an integer beyond all floats
        return False


def _holds(side: Text, prompt: Text) -> bool:
    """Whether a conversation already contains a prompt's text as a turn."""
    return not isinstance(side, str) and any(message["content"] == prompt for message in side[:-1])


def _once(prompt: Text, sides: Mapping[str, Text]) -> tuple[list[Text], tuple[str, ...]]:
    """The sides, by their columns' names, without the prompt where all of them repeat it, and what was found.

    Turns that are equal are repeated. A text may begin with a short prompt by chance ("Hi", "Hi there!"), and is used
    as it is.
    """
    if any(side[: len(prompt)] != prompt for side in sides.values()):
        return list(sides.values()), ()
    if isinstance(prompt, str) and len(prompt) < REPEATED:
        return list(sides.values()), (BEGINS,)
    rest = [side[len(prompt) :] for side in sides.values()]
    for name, own in zip(sides, rest, strict=True):
        if not own or (isinstance(own, str) and not own.strip()):
            raise RowError("empty", f"{name} holds nothing but the prompt")
    return rest, (TWICE,)


def _written_out(text: Text) -> tuple[str, ...]:
    return (WRITTEN_OUT,) if isinstance(text, str) and is_written_out(text) else ()


def _changed(completion: Text, rendered: str) -> tuple[str, ...]:
    """Whether the chat template left out or rewrote part of the last turn, such as its reasoning."""
    return () if isinstance(completion, str) or completion[-1]["content"].strip() in rendered else (CHANGED,)
