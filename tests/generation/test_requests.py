"""A completion is the same wherever and with whatever other requests it is asked for."""

from __future__ import annotations

import pytest
import torch

from tether.generation.engine import Engine
from tether.generation.naive import NaiveGenerator
from tether.models.loading import load_policy
from tether.types import Budget, Prompt, Request, Sampling, make_requests

SAMPLING = Sampling(max_new_tokens=12, temperature=1.5)
GROUP_SIZES = [3, 1, 0, 6, 2, 4]


@pytest.fixture(scope="module", params=["llama", "gemma2"])  # without and with attention windows
def directory(request, tiny_models):
    return tiny_models[request.param]


@pytest.fixture(scope="module")
def asked():
    """Requests of unequal sizes; the first and the last have the same prompt, but different seeds."""
    generator = torch.Generator().manual_seed(3)
    lengths = [9, 2, 4, 61, 30]
    prompts = [Prompt(ids=tuple(torch.randint(3, 260, (n,), generator=generator).tolist()), text="p") for n in lengths]
    full = make_requests([*prompts, prompts[0]], group_size=max(GROUP_SIZES), seed=7)
    return [Request(prompt=r.prompt, seeds=r.seeds[:size]) for r, size in zip(full, GROUP_SIZES, strict=True)]


@pytest.fixture(scope="module")
def loaded(directory):
    return load_policy(directory)


@pytest.fixture(scope="module")
def whole(loaded, asked):
    """All requests in one call."""
    return Engine(*loaded).generate(asked, sampling=SAMPLING)


def test_groups_of_unequal_sizes_are_the_oracles(loaded, asked, whole):
    assert [len(group.completions) for group in whole] == GROUP_SIZES
    assert [group.prompt for group in whole] == [request.prompt for request in asked]
    oracle = NaiveGenerator(*loaded).generate(asked, sampling=SAMPLING)
    for group, expected in zip(whole, oracle, strict=True):
        for a, b in zip(group.completions, expected.completions, strict=True):
            assert (a.ids, a.mask, a.finish_reason, a.text) == (b.ids, b.mask, b.finish_reason, b.text)
            assert all(a.mask)
            assert a.sampler_logp == pytest.approx(b.sampler_logp, abs=1e-4)


@pytest.mark.parametrize("budget", [Budget(max_rows=1), Budget(max_rows=6), Budget(cache_gib=2**-13)])
def test_the_budget_does_not_matter(loaded, asked, whole, budget):
    assert Engine(*loaded, budget=budget).generate(asked, sampling=SAMPLING) == whole


def test_requests_in_another_order(loaded, asked, whole):
    assert Engine(*loaded).generate(asked[::-1], sampling=SAMPLING) == whole[::-1]


def test_requests_by_themselves(loaded, asked, whole):
    sampler = Engine(*loaded)
    assert [sampler.generate([request], sampling=SAMPLING)[0] for request in asked] == whole


def test_requests_spread_over_two_engines(directory, loaded, asked, whole):
    one, other = Engine(*loaded), Engine(*load_policy(directory))
    assert one.generate(asked[::2], sampling=SAMPLING) == whole[::2]
    assert other.generate(asked[1::2], sampling=SAMPLING) == whole[1::2]


def test_the_seeds_of_a_request_spread_over_two_requests(loaded, asked, whole):
    prompt, seeds = asked[3].prompt, asked[3].seeds
    parts = [Request(prompt=prompt, seeds=seeds[4:]), Request(prompt=prompt, seeds=seeds[:4])]
    last, first = Engine(*loaded).generate(parts, sampling=SAMPLING)
    assert (*first.completions, *last.completions) == whole[3].completions


def test_the_seed_decides_and_not_the_place(loaded, asked):
    """Two requests with one prompt: other seeds give other completions, and the same seeds the same ones."""
    first, last = Engine(*loaded).generate([asked[0], asked[-1]], sampling=SAMPLING)
    assert {c.ids for c in first.completions}.isdisjoint({c.ids for c in last.completions})
    first, last = Engine(*loaded).generate([asked[0], asked[0]], sampling=SAMPLING)
    assert first == last


def test_nothing_asked_for_is_nothing_sampled(loaded, asked):
    assert Engine(*loaded).generate([], sampling=SAMPLING) == []
    (group,) = Engine(*loaded).generate([asked[2]], sampling=SAMPLING)
    assert group.completions == ()
