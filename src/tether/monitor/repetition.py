"""Completions that repeat themselves, or each other.

    words     = mean over completions of 1 - different words / words, in stretches of 25 words
    repeated  = mean over completions of 1 - different pairs of words / pairs of words
    alike     = share of completions that another completion of the same prompt equals, word by word

An alarm is raised once for each, where the mean of the last five steps is above that of the first five by
:data:`REPEATED`, or :data:`ALIKE` for the last. The ratio of the completions' size to their compressed size (zlib) is
given as further evidence: the text of a loop compresses well.
"""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from tether.monitor.trace import FIRST, LAST, Read, Trace, examples, read, words
from tether.observers import Alarm
from tether.types import StepResult

REPEATED, ALIKE = 0.12, 0.5
STRETCH = 25


@dataclass(kw_only=True)
class State:
    """All that a resumed run needs."""

    words: Trace = field(default_factory=Trace)
    repeated: Trace = field(default_factory=Trace)
    alike: Trace = field(default_factory=Trace)
    compression: Trace = field(default_factory=Trace)
    raised: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Repetition:
    """Raises an alarm where completions repeat themselves, and one where they repeat each other."""

    stop: bool = False
    name: str = "repetition"
    state: State = field(default_factory=State)

    def watch(self, step: int, result: StepResult) -> Sequence[Alarm]:
        groups, state = read(result), self.state
        texts = [one.text for group in groups for one in group]
        if not texts:
            return ()
        said = [words(text) for text in texts]
        state.words.take(fmean(map(repeated_words, said)))
        state.repeated.take(fmean(map(repeated, said)))
        state.alike.take(alike(groups))
        state.compression.take(compression("\n".join(texts)))
        if not state.alike.full:
            return ()
        ratio = f"a ratio of compression of {state.compression.now:.1f} ({state.compression.before:.1f} at the start)"
        found = (
            ("words", state.words, REPEATED, "of the words in a completion were in it before", ""),
            ("repeated", state.repeated, REPEATED, "of the pairs of words in a completion were in it before", ratio),
            ("alike", state.alike, ALIKE, "of the completions are equal to another one of the same prompt", ""),
        )
        alarms = []
        for what, trace, limit, meant, more in found:
            if what in state.raised or trace.now - trace.before < limit:
                continue
            state.raised.append(what)
            alarms.append(
                Alarm(
                    monitor=self.name,
                    message=f"{trace.now:.0%} {meant} in steps {step - LAST + 1} to {step}, {trace.before:.0%} in the "
                    "first "
                    f"{FIRST}{', with ' + more if more else ''}",
                    since=step - LAST + 1,
                    examples=examples(groups),
                    advice=EXPLORES if what == "alike" else LOOPS,
                    stop=self.stop,
                )
            )
        return alarms


LOOPS = "look at the samples; raise --kl-coef, lower --learning-rate, or add a reward such as repetition"
EXPLORES = "the policy has nothing left to explore: raise --temperature or --entropy-coef, or lower --learning-rate"


def repeated_words(said: Sequence[str]) -> float:
    """The share of words that stand earlier in their stretch of :data:`STRETCH` words, so that a longer text does not
    repeat more; signs are no words, and a short rest does not count.

    >>> repeated_words("a b a b .".split()), repeated_words([]), repeated_words(["a"] * 25 + ["b"])
    (0.5, 0.0, 0.96)
    """
    own = [word for word in said if word[0].isalnum()]
    stretches = [own[i : i + STRETCH] for i in range(0, len(own), STRETCH)]
    whole = [one for one in stretches if len(one) == STRETCH] or stretches
    return fmean([1 - len(set(one)) / len(one) for one in whole]) if whole else 0.0


def repeated(said: Sequence[str]) -> float:
    """The share of pairs of words that stand earlier in the text too.

    >>> repeated("a b a b a".split()), repeated("a b c".split()), repeated(["a"])
    (0.5, 0.0, 0.0)
    """
    pairs = list(itertools.pairwise(said))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def alike(groups: Sequence[Sequence[Read]]) -> float:
    """The share of completions that are not the only one of their text in their group; groups of one do not count."""
    counts = [Counter(" ".join(words(one.text)) for one in group) for group in groups if len(group) > 1]
    total = sum(map(sum, (count.values() for count in counts)))
    return sum(n for count in counts for n in count.values() if n > 1) / total if total else 0.0


def compression(text: str) -> float:
    """Bytes per byte of the compressed text."""
    data = text.encode(errors="backslashreplace")
    return len(data) / len(zlib.compress(data)) if data else 1.0
