"""Texts of several requests in one batch: which, in which order, how many, and what happens when scoring fails."""

import asyncio
import contextlib
import threading

import pytest

from tether.serve.batching import Batcher, FullError


def rows(*lengths):
    return [((0,) * (length - 1), (length,)) for length in lengths]


class Scores:
    """Gives the length of each row, keeps what it was given, and waits where it is told to."""

    def __init__(self):
        self.batches, self.go = [], threading.Event()
        self.go.set()

    def __call__(self, given):
        self.batches.append([len(before) + len(after) for before, after in given])
        assert self.go.wait(20)
        if any(len(before) == 12 for before, _ in given):
            raise ValueError("thirteen")
        return [float(len(before) + len(after)) for before, after in given]


def run(batcher, scores, requests, **patches):
    """All requests at once, while the scorer is held by a first one; results or errors in their order."""

    async def whole():
        task = asyncio.create_task(batcher.run())
        scores.go.clear()
        first = asyncio.create_task(batcher.scores(rows(1)))
        while not scores.batches:
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(batcher.scores(rows(*lengths))) for lengths in requests]
        await asyncio.sleep(0)
        scores.go.set()
        found = await asyncio.gather(first, *others, return_exceptions=True)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return found[1:]

    return asyncio.run(whole())


def test_what_waits_is_one_batch():
    scores = Scores()
    batcher = Batcher(scores, 100, 100)
    assert run(batcher, scores, [[3, 4], [5], [6, 7]]) == [[3.0, 4.0], [5.0], [6.0, 7.0]]
    assert scores.batches == [[1], [3, 4, 5, 6, 7]]
    assert (batcher.counts.batches, batcher.counts.texts, batcher.counts.tokens) == (2, 6, 26)


def test_a_batch_ends_at_the_budget_and_keeps_the_order():
    scores = Scores()
    assert run(Batcher(scores, 10, 100), scores, [[6], [4], [1], [20, 5], [2]]) == [[6.0], [4.0], [1.0], [20, 5], [2]]
    assert scores.batches == [[1], [6, 4], [1], [20, 5], [2]]


def test_a_batch_that_fails_is_the_answer_to_its_requests_alone():
    scores = Scores()
    first, second, third = run(Batcher(scores, 15, 100), scores, [[13], [2], [9]])
    assert [str(first), str(second), third] == ["thirteen", "thirteen", [9.0]]


def test_a_request_whose_client_has_gone_does_not_hold_up_the_others():
    scores = Scores()
    batcher = Batcher(scores, 100, 100)

    async def whole():
        task = asyncio.create_task(batcher.run())
        gone, stays = (asyncio.create_task(batcher.scores(rows(n))) for n in (2, 3))
        await asyncio.sleep(0)
        gone.cancel()
        found = await stays
        task.cancel()
        return found

    assert asyncio.run(whole()) == [3.0]


def test_only_so_many_texts_may_wait():
    batcher = Batcher(Scores(), 100, 4)
    with batcher.place(3):
        with pytest.raises(FullError, match="too many texts wait already; try again in 1 s"):
            batcher.place(2).__enter__()
        with batcher.place(1):
            assert batcher.held == 4
    assert batcher.held == 0
    batcher.counts.texts, batcher.counts.batch_seconds = 10, 20.0  # two seconds each
    with batcher.place(4), pytest.raises(FullError, match="in 8 s"):
        batcher.place(1).__enter__()
