"""What a run was given, as one hash: the same on every machine; it differs where a token, margin or column does.

fingerprint = blake2b_16(digest(r_1) digest(r_2) ... digest(r_N))
"""

from __future__ import annotations

import json
import re
import struct
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from tether.types import Demonstration, PreferencePair, Prompt

Record = Prompt | PreferencePair | Demonstration


def fingerprint(records: Iterable[Record]) -> str:
    """32 hexadecimal digits that depend on the records and their order alone."""
    whole = blake2b(digest_size=16)
    for record in records:
        whole.update(digest(record))
    return whole.hexdigest()


def digest(record: Record) -> bytes:
    """16 bytes, equal for equal records and in practice different for others."""
    if isinstance(record, Prompt):
        turns = None if record.messages is None else [dict(turn) for turn in record.messages]
        return _digest(b"prompt", [record.ids], _JSON.encode([record.text, turns, record.columns]).encode())
    if isinstance(record, PreferencePair):
        sides = [record.prompt_ids, record.chosen_ids, record.rejected_ids]
        return _digest(b"pair", sides, struct.pack("<d", record.margin))
    masks = [] if record.completion_mask is None else [record.completion_mask]
    return _digest(b"demonstration", [record.prompt_ids, record.completion_ids, *masks])


def tokens_digest(*sequences: Sequence[int]) -> bytes:
    """16 bytes that identify sequences of token ids."""
    return _digest(b"tokens", sequences)


def _digest(kind: bytes, sequences: Iterable[Sequence[int]], about: bytes = b"") -> bytes:
    ids = [array("q", sequence) for sequence in sequences]
    if sys.byteorder == "big":
        for one in ids:
            one.byteswap()
    # the lengths say where each part ends, so that different records never give the same bytes
    lengths = struct.pack(f"<{len(ids)}Q", *map(len, ids))
    return blake2b(b"".join([lengths, *ids, about]), digest_size=16, person=kind).digest()


def _plain(value: Any) -> Any:
    """A value that JSON does not know, as data that depends on what it holds alone, and not on where it is stored."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    kind = type(value).__name__
    if callable(octets := getattr(value, "tobytes", None)):  # an image or an array, whose repr leaves out most of it
        about = [str(getattr(value, name, None)) for name in ("mode", "size", "dtype", "shape")]
        return [kind, *about, blake2b(octets(), digest_size=16).hexdigest()]
    return _ADDRESS.sub("", repr(value))


_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
"""How the ``repr`` of an object says where it is in memory."""
_JSON = json.JSONEncoder(sort_keys=True, default=_plain)
"""Writes a value of a data row; what JSON does not know, such as a date, as its ``repr``."""
