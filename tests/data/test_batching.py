"""Orders, minibatches and micro-batches."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tether.data.batching import Cursor, epoch_order, epoch_steps, micro_batches, minibatches, within_budget
from tether.errors import ConfigError
from tether.types import Batch


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(0, 3), st.lists(st.integers(0, 12), max_size=12))
def test_a_cursor_gives_every_row_once_an_epoch_however_it_is_asked(count, seed, asks):
    rows = list(range(count))
    cursor = Cursor(count, seed)
    taken = [row for n in asks for row in cursor.take(rows, n)]
    assert cursor.position == len(taken) == sum(asks)
    assert taken == Cursor(count, seed).take(rows, sum(asks))
    for start in range(0, len(taken) - count + 1, count):
        assert sorted(taken[start : start + count]) == rows


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(0, 40), st.integers(0, 40))
def test_a_cursor_goes_on_from_its_position(count, before, after):
    rows = list(range(count))
    whole = Cursor(count, 7)
    first, second = whole.take(rows, before), whole.take(rows, after)
    assert Cursor(count, 7).take(rows, before) == first
    assert Cursor(count, 7, position=before).take(rows, after) == second


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 50), st.integers(1, 60), st.integers(1, 3), st.integers(0, 200))
@example(40, 16, 2, 3)
@example(48, 16, 2, 2)
@example(5, 60, 3, 1)
def test_every_epoch_takes_every_row_once(count, batch_size, epochs, resumed_after):
    rows, steps = list(range(count)), epoch_steps(epochs, count=count, batch_size=batch_size)
    cursor, taken = Cursor(count, 3), []
    for step in range(steps):
        if step == resumed_after:
            cursor = Cursor(count, 3, position=cursor.position)
        taken.append(cursor.take_in_epoch(rows, batch_size))
    assert all(1 <= len(batch) <= batch_size for batch in taken)
    flat = [row for batch in taken for row in batch]
    assert len(flat) == epochs * count
    for start in range(0, len(flat), count):
        assert sorted(flat[start : start + count]) == rows


@pytest.mark.parametrize(
    ("epochs", "count", "batch_size", "steps"),
    [
        (1, 40, 16, 3),
        (1, 48, 16, 3),
        (1, 49, 16, 4),
        (2.5, 40, 16, 8),  # 3 + 3 + 20 rows
        (0.5, 40, 16, 2),
        (0.1, 40, 4, 1),
        (1.1, 40, 4, 11),  # not 12: the fraction is 0.1, not 0.1000000000000001
        (0.001, 10, 4, 1),
        (3, 8, 32, 3),
        (1e-320, 8, 32, 1),
        (1, 1, 1, 1),
    ],
)
def test_steps_of_epochs(epochs, count, batch_size, steps):
    assert epoch_steps(epochs, count=count, batch_size=batch_size) == steps


def test_epochs_and_seeds_differ():
    orders = [tuple(epoch_order(20, seed=seed, epoch=epoch)) for seed in range(2) for epoch in range(2)]
    assert len(set(orders)) == 4


def test_a_cursor_refuses_other_rows():
    with pytest.raises(ValueError, match="walks over 3 rows, got 2"):
        Cursor(3, 0).take([1, 2], 1)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), st.integers(0, 5))
def test_minibatches_partition(shape, seed):
    count, parts = shape
    found = minibatches(count, parts, seed=seed)
    assert len(found) == parts
    assert sorted(torch.cat(found).tolist()) == list(range(count))
    sizes = [len(part) for part in found]
    assert max(sizes) - min(sizes) <= 1
    assert all(torch.equal(a, b) for a, b in zip(found, minibatches(count, parts, seed=seed), strict=True))


@pytest.mark.parametrize("parts", [0, 5])
def test_minibatches_that_cannot_be(parts):
    with pytest.raises(ConfigError, match=r"minibatches must lie in 1..4"):
        minibatches(4, parts, seed=0)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 5)), min_size=1, max_size=30),
    st.integers(1, 200),
)
def test_micro_batches_cover_every_row_once_within_the_budget(rows, budget):
    """A prompt counts once in each part, however many of its completions are there."""
    batch = Batch.collate([([who] * (who + 1), [0] * own) for own, who in rows])
    found = micro_batches(batch, budget)
    assert sorted(torch.cat(found).tolist()) == list(range(len(rows)))
    for part in found:
        members = [rows[i] for i in part.tolist()]
        tokens = sum(own for own, _ in members) + sum(who + 1 for who in {who for _, who in members})
        assert len(part) == 1 or tokens <= budget


def test_micro_batches_keep_groups_together_and_like_lengths_too():
    rows = [([1, 2], [0] * n) for n in (3, 3)] + [([5, 6], [0] * n) for n in (9, 8)] + [([7, 8], [0])]
    assert [sorted(part.tolist()) for part in micro_batches(Batch.collate(rows), 19)] == [[2, 3], [0, 1, 4]]


def test_items_of_one_owner_pay_for_it_once():
    assert [sorted(p.tolist()) for p in within_budget([4, 4, 4], [6, 6, 6], [0, 0, 1], 14)] == [[0, 1], [2]]
    assert [sorted(p.tolist()) for p in within_budget([4, 4, 4], [6, 6, 6], [0, 1, 2], 14)] == [[0], [1], [2]]
