"""A phrase that takes over: an n-gram whose share among completions is far above what it was at the start.

    share of a phrase at a step = mean over prompts of the share of its completions that have the phrase

"Thank you" in every answer is the known case: a reward model overrates a phrase, and the policy learns to say it. The
first steps stand for the reference. A phrase is nominated where it looks frequent, and is then tested on the steps
after its nomination alone, so that the search for it does not count as evidence. With n prompts since and n_0 at the
start, the alarm is raised where

    lower(share, n; a) > upper(share_0, n_0; a)  and  share - share_0 >= 0.3

with the bounds of :func:`tether.ops.bounds.mean_bounds`. The j-th phrase that is nominated is tested
for the s-th time, with a = ALPHA / 2 / (j (j + 1) s (s + 1)); these sum to ALPHA / 2 over all phrases and looks (1/2 +
1/6 + 1/12 + ... = 1), for each of the two bounds. So in a run in which no phrase becomes more frequent, an alarm is
raised with a probability of at most :data:`ALPHA`, if prompts are independent. A phrase that becomes more frequent for
a good reason raises it too: the alarm shows the phrase, and a person judges.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from tether.monitor.trace import FIRST, Read, examples, read, words
from tether.observers import Alarm
from tether.ops.bounds import mean_bounds
from tether.types import StepResult

ALPHA = 0.01
"""Probability of a false alarm in the whole run."""
LONGEST = 4
"""Words of a phrase."""
FREQUENT, RARE, RISE = 0.35, 0.2, 0.3
"""Share at which a phrase is nominated, share that it has at the start at most, and the least rise."""
AT_ONCE = 12
"""Phrases that are tested at the same time."""
MOST_TEXTS = 256
"""Completions of a step that are read."""
FIRST_LOOK, GROWTH = 8, 1.5
"""Prompts at which a phrase is tested first, and how many times as many there are at each further test."""


@dataclass(kw_only=True)
class Tested:
    """A nominated phrase."""

    number: int
    """Among the nominated ones, from 1."""
    since: int
    """The step that nominated it."""
    prompts: int = 0
    """Prompts since."""
    total: float = 0.0
    """The sum of its shares in them."""
    looks: int = 0


@dataclass(kw_only=True)
class State:
    """All that a resumed run needs."""

    steps: int = 0
    start: list[list[str]] = field(default_factory=list)
    """Per prompt of the first steps, its completions as words between spaces."""
    tested: dict[str, Tested] = field(default_factory=dict)
    nominated: int = 0
    found: list[str] = field(default_factory=list)
    """Phrases of which an alarm was raised."""


@dataclass(kw_only=True)
class PhraseTakeover:
    """Raises an alarm for each phrase that takes over."""

    stop: bool = False
    name: str = "phrase_takeover"
    state: State = field(default_factory=State)
    known: dict[str, float] = field(default_factory=dict)
    """Shares at the start that were asked for, which follow from the state."""

    def watch(self, step: int, result: StepResult) -> Sequence[Alarm]:
        groups, state = limited(read(result)), self.state
        if not groups:
            return ()
        state.steps += 1
        texts = [[spaced(one.text) for one in group] for group in groups]
        if state.steps <= FIRST:
            state.start += texts
            return ()
        alarms = []
        for phrase, tested in list(state.tested.items()):
            shares = [share_of(phrase, group) for group in texts]
            tested.prompts += len(shares)
            tested.total += sum(shares)
            if self._is_above(phrase, tested):
                alarms.append(self._alarm(step, phrase, tested, groups))
                state.found.append(phrase)
            elif tested.total / tested.prompts >= FREQUENT / 2:
                continue
            del state.tested[phrase]
        self._nominate(step, groups, texts)
        return alarms

    def _is_above(self, phrase: str, tested: Tested) -> bool:
        """Whether the phrase is more frequent than it was, as far as it is tested now."""
        if tested.prompts < FIRST_LOOK * GROWTH**tested.looks:
            return False
        tested.looks += 1
        j, s = tested.number, tested.looks
        alpha = ALPHA / 2 / (j * (j + 1) * s * (s + 1))
        share, before = tested.total / tested.prompts, self._before(phrase)
        lower, _ = mean_bounds(share, tested.prompts, alpha=alpha)
        _, upper = mean_bounds(before, len(self.state.start), alpha=alpha)
        return lower > upper and share - before >= RISE

    def _before(self, phrase: str) -> float:
        """The share of a phrase at the start, which does not change any more."""
        if phrase not in self.known:
            self.known[phrase] = fmean([share_of(phrase, group) for group in self.state.start])
        return self.known[phrase]

    def _nominate(self, step: int, groups: Sequence[Sequence[Read]], texts: Sequence[Sequence[str]]) -> None:
        """Choose the phrases that the next steps test: the most frequent ones that were rare, longer ones before those
        that they contain."""
        prompts, least = [spaced(group[0].prompt) for group in groups], FREQUENT * len(groups)
        single = shares_of([[set(text.split()) for text in group] for group in texts])
        frequent_words = frozenset(word for word, total in single.items() if total >= least)
        shares = shares_of(
            [
                [{one for one in phrases_in(text, frequent_words) if one not in prompt} for text in group]
                for group, prompt in zip(texts, prompts, strict=True)
            ]
        )
        frequent = [(total / len(groups), phrase) for phrase, total in shares.items() if total >= least]
        frequent.sort(key=lambda pair: (-round(pair[0], 1), -len(pair[1]), pair[1]))
        for _, phrase in frequent:
            if len(self.state.tested) >= AT_ONCE:
                return
            known = [*self.state.tested, *self.state.found]
            if any(phrase in other or other in phrase for other in known) or self._before(phrase) > RARE:
                continue
            self.state.nominated += 1
            self.state.tested[phrase] = Tested(number=self.state.nominated, since=step)

    def _alarm(self, step: int, phrase: str, tested: Tested, groups: Sequence[Sequence[Read]]) -> Alarm:
        said, share, first = phrase.strip(), tested.total / tested.prompts, tested.since + 1
        when = f"of step {step}" if first == step else f"of steps {first} to {step}"
        return Alarm(
            monitor=self.name,
            message=f"{said!r} is in {share:.0%} of the completions {when}, and was in "
            f"{self._before(phrase):.0%} of those of the first {FIRST} steps",
            since=tested.since,
            phrase=said,
            examples=examples(groups, having=said),
            advice="read the samples: if the phrase earns reward without making them better, the reward overrates it. "
            "Raise --kl-coef, or train the reward model on pairs in which the phrase loses",
            stop=self.stop,
        )


def limited(groups: Sequence[Sequence[Read]]) -> list[Sequence[Read]]:
    """Groups with completions, up to :data:`MOST_TEXTS` of these."""
    found, left = [], MOST_TEXTS
    for group in groups:
        if group and left > 0:
            found.append(group)
            left -= len(group)
    return found


def spaced(text: str) -> str:
    """The words of a text, with a space around each, so that a phrase is a part of it only as whole words."""
    return f" {' '.join(words(text))} "


def shares_of(found: Sequence[Sequence[Collection[str]]]) -> dict[str, float]:
    """The sum over prompts of the share of its completions that have something, from what each of them has."""
    shares: dict[str, float] = defaultdict(float)
    for group in found:
        for one in group:
            for what in one:
                shares[what] += 1 / len(group)
    return shares


def phrases_in(text: str, among: Collection[str]) -> set[str]:
    """The phrases of 1 to :data:`LONGEST` words ``among`` some in a text of :func:`spaced`, in its form; none begins or
    ends with a sign. A phrase is as frequent as its rarest word at most, so that only frequent words need a look.

    >>> sorted(phrases_in(" so it , is ", {"so", "it", ","}))
    [' it ', ' so ', ' so it ']
    """
    said, found = text.split(), set()
    for i, word in enumerate(said):
        if word not in among or not word[0].isalnum():
            continue
        for k in range(i, min(i + LONGEST, len(said))):
            if said[k] not in among:
                break
            if said[k][0].isalnum():
                found.add(f" {' '.join(said[i : k + 1])} ")
    return found


def share_of(phrase: str, texts: Sequence[str]) -> float:
    return sum(phrase in text for text in texts) / len(texts)
