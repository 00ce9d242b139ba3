"""Multiple choice: which letter a text chooses."""

from __future__ import annotations

import re
from typing import Any

from tether.rewards.answers import marked

LETTERS = "ABCDEFGHIJ"

_SEVERAL = "\0"
_LIST = re.compile(r"\(?\b[A-J]\b\)?(?:\s*(?:,\s*(?:or|and)\b|,|/|&|\bor\b|\band\b)\s*\(?\b[A-J]\b\)?)+")
_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mathbb)\s*\{([^{}]*)\}")
_ALONE = re.compile(r"\(?([A-Ja-j])\)?[.:]?")
_WITH_TEXT = re.compile(r"\(?([A-J])[).:][^\n]*")
_STATED = re.compile(
    r"(?i:\b(?:answer|choice|option)\b)[^\n.:\0]{0,40}?(?:\bis\b|:|=)\s*:?\s*(?:(?i:choice|option|letter)\s+)?"
    rf"\(?([A-J]|{_SEVERAL})(?![\w'’])(?!(?<=I)\s+[a-z])"
)
_BRACKETED = re.compile(r"\(([A-J])\)")
_LAST = re.compile(r"(?:^|\s)([A-J])\.?\s*\Z")


def choice(text: str) -> str | None:
    r"""The letter from A to J that a completion chooses, or None where it chooses none, or several.

    It is what the last ``\boxed{...}`` or ``####`` marks, else what the last ``answer is B``, ``Answer: (B)`` or
    ``option B is`` states, else the text itself (``B``, ``(b)``, ``B. Paris``), else the last ``(B)``, else the letter
    at the end. In prose a letter is a capital.

    >>> choice(r"\boxed{\text{(B)}}"), choice("So the answer is **C**, not (D)."), choice("A or B"), choice("a cat")
    ('B', 'C', None, None)
    """
    if found := marked(text):
        return _itself(_plain(found))
    plain = _plain(text)
    if stated := _STATED.findall(plain):
        return None if stated[-1] == _SEVERAL else str(stated[-1])
    if whole := _itself(plain):
        return whole
    found = (_BRACKETED.findall(plain) or _LAST.findall(plain) or [""])[-1]
    return found or None


def _plain(text: str) -> str:
    """``text`` without markup, and with one character in place of several letters, as in ``A or B``."""
    return _LIST.sub(_SEVERAL, re.sub(r"[*_`$\"“”\0]", "", _COMMAND.sub(r"\1", text))).strip()


def _itself(text: str) -> str | None:
    """The letter that the whole text is, or that it begins with, as in ``B. Paris`` on one line."""
    match = _ALONE.fullmatch(text) or _WITH_TEXT.fullmatch(text)
    return match.group(1).upper() if match else None


def letter_of(cell: Any) -> str | None:
    """The choice that a cell of a column holds: a letter, alone or in brackets, or a number counted from 0."""
    if isinstance(cell, int) and not isinstance(cell, bool):
        return LETTERS[cell] if 0 <= cell < len(LETTERS) else None
    return _itself(_plain(marked(cell) or cell)) if isinstance(cell, str) else None
