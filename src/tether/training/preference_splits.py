"""The three splits of preference pairs: those to learn from, those to stop and choose by, and those to judge by.

The accuracy of a model that was chosen by its accuracy on some pairs is too high on them. A test split is therefore cut
off too, and nothing in a run depends on it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tether.algorithms.pair_evaluation import accuracy_interval
from tether.data.checks import DataReport, OnBadRows, keep_apart
from tether.data.splitting import PromptKey, hold_out, prompt_key, together
from tether.data.tokenise import special_front
from tether.seeds import derive_seed
from tether.training.common import Loaded
from tether.types import PreferencePair
from tether.untrusted import printable

SMALL = 30
"""Pairs below which a split has a line that says how little can be known from it."""
SHARED_PROMPT = "prompt held out too: used"
"""Kind of finding: a training row whose prompt is in a file of held-out pairs, with other sides."""

Pairs = list[PreferencePair]


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Pairs that have none in common. No prompt is in two of them, unless given files have it so."""

    training: Pairs
    stopping: Pairs
    """What decides when training stops and which weights are kept."""
    test: Pairs
    """What the model that is kept is judged by; nothing depends on them. May be empty."""

    @property
    def judged(self) -> Pairs:
        """The test pairs; the stopping pairs where there are none."""
        return self.test or self.stopping


def split(
    pairs: Pairs,
    *,
    stopping: Pairs | None,
    test: Pairs | None,
    eval_share: float,
    test_share: float,
    loaded: Loaded,
    on_bad_rows: OnBadRows,
    seed: int,
) -> Splits:
    """Cut what is not given (None) from ``pairs``: about ``eval_share`` of them to stop by, and ``test_share`` to judge
    by; a split that cannot be cut, because there are too few prompts, is empty.

    A split that is cut has no prompt of another one. A pair that a given file holds too is an error, or left out where
    ``on_bad_rows`` says so; a prompt that a given file holds too is counted.
    """
    keys = _keys([*pairs, *(stopping or []), *(test or [])], loaded)
    here = [keys[id(pair)] for pair in pairs]
    held = {keys[id(pair)] for pair in [*(stopping or []), *(test or [])]}
    left = list(range(len(pairs)))
    cut: list[Pairs] = []
    for given, share, name in ((stopping, eval_share, "held out"), (test, test_share, "test")):
        if given is not None or share == 0:
            cut.append(given or [])
            continue
        remain, taken = hold_out(
            [here[i] for i in left], count=round(share * len(pairs)), seed=derive_seed(seed, name), apart=held
        )
        cut.append([pairs[left[i]] for i in taken])
        left = [left[i] for i in remain]
    training = [pairs[i] for i in left]
    splits = Splits(training=training, stopping=cut[0], test=cut[1])
    splits = _apart(splits, given=(stopping, test), report=loaded.report, on_bad_rows=on_bad_rows)
    _count_shared(splits.training, held, keys, loaded.report)
    return splits


def _keys(pairs: Sequence[PreferencePair], loaded: Loaded) -> dict[int, PromptKey]:
    """The prompt of each pair, by its ``id``."""
    front = special_front(loaded.tokenizer, loaded.tokenizer("")["input_ids"])
    keys = [prompt_key(pair, loaded.report.origin(pair)[0].values, front=front) for pair in pairs]
    return {id(pair): key for pair, key in zip(pairs, together(keys), strict=True)}


def _count_shared(training: Pairs, held: set[PromptKey], keys: dict[int, PromptKey], report: DataReport) -> None:
    """Count the training rows whose prompt is in a given file."""
    for pair in training:
        if keys[id(pair)] in held:
            row, source = report.origin(pair)
            source.find(SHARED_PROMPT, row.where)


def _apart(
    splits: Splits, *, given: tuple[Pairs | None, Pairs | None], report: DataReport, on_bad_rows: OnBadRows
) -> Splits:
    """The splits without pairs that another one holds. Such a pair is an error only where a file was given to hold it
    out; in a split that was cut, it can only be one whose prompt is written in two ways."""
    training, stopping, test = splits.training, splits.stopping, splits.test
    stopping = keep_apart(stopping, test, report=report, on_bad_rows="skip" if None in given else on_bad_rows)
    for held, file in ((stopping, given[0]), (test, given[1])):
        training = keep_apart(training, held, report=report, on_bad_rows="skip" if file is None else on_bad_rows)
    return Splits(training=training, stopping=stopping, test=test)


def tell_small(splits: Splits, *, wants_test: bool, name: str = "stopping") -> None:
    """Say on the standard error which splits are small, and what an accuracy on so few pairs means; ``name`` is what
    the stopping pairs are called."""
    for line in small(splits, wants_test=wants_test, name=name):
        print(printable(line), file=sys.stderr)


def small(splits: Splits, *, wants_test: bool, name: str = "stopping") -> Iterator[str]:
    """The lines of :func:`tell_small`."""
    if wants_test and not splits.test:
        yield "test split: none, because too few prompts are left; give --test-pairs"
    for which, pairs, flag in ((name, splits.stopping, "eval"), ("test", splits.test, "test")):
        if 0 < (count := len(pairs)) < SMALL:
            right = round(0.75 * count)
            low, high = accuracy_interval([1.0] * right + [0.0] * (count - right), range(count))
            yield (
                f"{which} split: {count} pair{'s' * (count > 1)}, on which an accuracy of {right / count:.0%} has the "
                f"95% interval {low:.0%} to {high:.0%}; give more by --{flag}-pairs or --{flag}-share"
            )
