"""Pairs in, labels out: the protocol of labellers, and the checks of what they answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from tether.data.tokenise import Text
from tether.errors import RewardError
from tether.rewards.function import as_given
from tether.types import Completion, Prompt, RolloutGroup
from tether.untrusted import shown

Label = Literal["first", "second", "tie", "skip"]
"""The better one of two completions, neither, or no answer."""
LABELS: tuple[Label, ...] = get_args(Label)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two completions of one prompt."""

    prompt: Prompt
    first: Completion
    second: Completion

    @property
    def texts(self) -> dict[str, Text]:
        """``prompt``, ``first`` and ``second`` as text or messages."""
        return {
            "prompt": list(self.prompt.messages) if self.prompt.messages else self.prompt.text,
            "first": as_given(self.prompt, self.first),
            "second": as_given(self.prompt, self.second),
        }


class Labeller(Protocol):
    """Anything that compares completions. A failure raises :class:`RewardError`; it is never a tie or a skip."""

    @property
    def name(self) -> str:
        """The source of its labels."""
        ...

    def label(self, pairs: Sequence[Pair]) -> list[Label]:
        """One label per pair, in their order."""
        ...


def pairs_of(groups: Sequence[RolloutGroup]) -> Iterator[Pair]:
    """The completions of each group two by two, in the order in which they were sampled. Those with equal texts, and
    those of which one is blank, state no preference and are left out."""
    for group in groups:
        for first, second in zip(group.completions[::2], group.completions[1::2], strict=True):
            if first.text.strip() and second.text.strip() and first.text != second.text:
                yield Pair(prompt=group.prompt, first=first, second=second)


def checked(labels: Sequence[Any], pairs: Sequence[Pair], *, name: str) -> list[Label]:
    """``labels`` as one :data:`Label` per pair. Raises :class:`RewardError`."""
    if len(labels) != len(pairs):
        raise RewardError(f"labeller {name!r} gave {len(labels)} labels for {len(pairs)} pairs")
    for number, label in enumerate(labels):
        if not isinstance(label, str) or label not in LABELS:
            raise RewardError(
                f"labeller {name!r} gave {shown(label)} for pair {number}", hint=f"a label is {', '.join(LABELS)}"
            )
    return list(labels)


def preferences(pairs: Sequence[Pair], labels: Sequence[Label], *, name: str) -> Iterator[dict[str, Any]]:
    """Rows with ``prompt``, ``chosen``, ``rejected`` and ``labeller``; ties and skips have none."""
    for pair, label in zip(pairs, labels, strict=True):
        if label in ("first", "second"):
            texts = pair.texts
            chosen, rejected = ("first", "second") if label == "first" else ("second", "first")
            yield {
                "prompt": texts["prompt"],
                "chosen": texts[chosen],
                "rejected": texts[rejected],
                "labeller": name,
            }
