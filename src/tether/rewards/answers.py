r"""Final answers: where a text states one, and which answers are equal.

A number is exact: every notation of one number is equal, and different numbers differ, however close or large they are.
"""

from __future__ import annotations

import re
from fractions import Fraction

Answer = Fraction | str
"""A number, or text without case and outer white space."""

LONGEST_NUMBER = 4000
"""Characters; Python converts no longer ones."""

_SIGN = r"[-+]?"
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_POWER = (
    r"(?:[eE][-+]?[0-9]{1,3}(?![0-9A-Za-z])|\s?(?:\\times|\\cdot|×|\*)\s?10\^(?:\{[-+]?[0-9]{1,3}\}|[-+]?[0-9]{1,3}))"
)
_SCALAR = rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+){_POWER}?"
_TEX = rf"\\[dt]?frac\s?(?:\{{\s*{_SIGN}{_SCALAR}\s*\}}|[0-9])\s?(?:\{{\s*{_SIGN}{_SCALAR}\s*\}}|[0-9])"
_SHORT_SPACE = "[\u00a0\u2009\u202f]"
_MINUS = str.maketrans("\u2212\u2013", "--")

_SCALAR_PARTS = re.compile(rf"({_SIGN})((?:{_DIGITS})?(?:\.[0-9]+)?)({_POWER})?")
_WHOLE = re.compile(
    rf"(?P<sign>{_SIGN})\s*(?:(?P<whole>{_DIGITS})\s*(?=\\)|(?P<units>{_DIGITS})\s+(?=[0-9]+/[0-9]))?"
    rf"(?:(?P<top>{_SCALAR})(?:\s*/\s*(?P<bottom>{_SIGN}{_SCALAR}))?|(?P<tex>{_TEX}))"
)
_WITHIN = re.compile(
    rf"(?:(?<![\w.)\]}}]){_SIGN})(?:{_DIGITS})?{_TEX}|(?:(?<![\w.)\]}}]){_SIGN})?{_SCALAR}(?:/{_DIGITS})?"
)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_MARK = re.compile(r"(?<!#)####(?!#)[^\S\n]*([^\n]*?)[^\S\n]*(?=\n|####|\Z)")


def final_answer(completion: str) -> Answer:
    """What the last ``\\boxed{...}`` holds, else what ``####`` marks, else the last number, else the whole text."""
    found = marked(completion)
    if found or number(completion) is not None:
        return canonical(found or completion)
    numbers = [match.group() for match in _WITHIN.finditer(_plain(completion))]
    return canonical(numbers[-1] if numbers else completion)


def marked(text: str) -> str:
    """What the last ``\\boxed{...}`` holds, else what ``####`` marks on its line, else nothing.

    The last ``#### NUMBER`` counts. Other text after ``####`` counts only where nothing follows its line: elsewhere it
    is a heading.
    """
    if box := _boxed(text):
        return box
    lines = list(_MARK.finditer(text))
    numbers = [line.group(1) for line in lines if number(line.group(1)) is not None]
    if numbers:
        return numbers[-1]
    return lines[-1].group(1) if lines and not text[lines[-1].end() :].strip() else ""


def _boxed(text: str) -> str:
    """What the last ``\\boxed{...}`` holds; nothing where it is not closed."""
    boxes = list(_BOX.finditer(text))
    depth = 1
    inside = text[boxes[-1].end() :] if boxes else ""
    for i, character in enumerate(inside):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return inside[:i]
    return ""


def canonical(answer: str) -> Answer:
    """The number that the whole ``answer`` is, or else its text without case and outer white space."""
    value = number(answer)
    return answer.strip().lower() if value is None else value


def number(text: str) -> Fraction | None:
    r"""The number that the whole ``text`` is, exactly; None where it is none.

    A sign, thousands separators, decimals, an exponent (``1e3``, ``1 \times 10^{3}``), a fraction (``1/2``,
    ``\frac{1}{2}``, ``1 1/2``), ``$`` and ``%``, and a final full stop may belong to it. ``50%`` is 50, not 0.5.

    >>> number("1,234.50") == number("+1234.5"), number(r"\frac{1}{2}") == number("0.5"), number("1,23")
    (True, True, None)
    """
    match = _WHOLE.fullmatch(_plain(text).strip().removesuffix(".").strip()) if len(text) <= LONGEST_NUMBER else None
    if match is None:
        return None
    parts = match.groupdict()
    if parts["tex"]:
        body = re.sub(r"^\\[dt]?frac\s?", "", parts["tex"])
        top, bottom = re.findall(r"\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}|[0-9]", body)
        above, below = _scalar(_unbraced(top)), _scalar(_unbraced(bottom))
    else:
        above, below = _scalar(parts["top"]), _scalar(parts["bottom"] or "1")
    if below == 0:
        return None
    value = _scalar(parts["whole"] or parts["units"] or "0") + above / below
    return -value if parts["sign"] == "-" else value


def _plain(text: str) -> str:
    """``text`` with one minus sign, one thousands separator, and without ``$`` and ``%``."""
    text = re.sub(rf"\{{,\}}|\\,|(?<=[0-9]){_SHORT_SPACE}(?=[0-9]{{3}})", ",", text.translate(_MINUS))
    return re.sub(r"\\!|\\?[$%]", "", text)


def _unbraced(part: str) -> str:
    return part[1:-1].strip() if part.startswith("{") else part


def _scalar(text: str) -> Fraction:
    """A number without a fraction bar."""
    match = _SCALAR_PARTS.fullmatch(text)
    assert match is not None, text
    sign, digits, power = match.groups()
    value = Fraction(digits.replace(",", "") if not digits.startswith(".") else f"0{digits}")
    if power:
        value *= Fraction(10) ** int(re.sub(r"^(?:[eE]|.*10\^\{?)|\}$", "", power.strip()))
    return -value if sign == "-" else value
