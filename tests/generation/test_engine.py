"""The engine against the naive oracle and against transformers, on every architecture."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tether.errors import GuardError
from tether.generation import scheduler
from tether.generation.engine import Engine, bands, rows_and_slots
from tether.generation.naive import NaiveGenerator
from tether.models.loading import load_policy
from tether.models.policy import completion_logprobs
from tether.types import Batch, Budget, FinishReason, Prompt, Sampling, make_requests
from tiny import ARCHITECTURES

PROMPTS = [
    Prompt(ids=(0, 70, 71, 72, 73, 74, 75, 76, 77), text="abcdefgh"),
    Prompt(ids=(0, 80), text="q"),
    Prompt(ids=(0, 90, 91, 92), text="xyz"),
]


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def loaded(request, tiny_models):
    return load_policy(tiny_models[request.param])


def run(generator_class, loaded, sampling, *, group_size=3, prompts=PROMPTS, seed=7, **kwargs):
    """The groups that a generator of this class gives for the prompts."""
    asked = make_requests(prompts, group_size=group_size, seed=seed)
    return generator_class(*loaded, **kwargs).generate(asked, sampling=sampling)


def assert_same(found, expected, tolerance=1e-4):
    for a, b in zip(found, expected, strict=True):
        for x, y in zip(a.completions, b.completions, strict=True):
            assert (x.ids, x.mask, x.finish_reason, x.text) == (y.ids, y.mask, y.finish_reason, y.text)
            assert x.weights_version == y.weights_version
            assert x.sampler_logp == pytest.approx(y.sampler_logp, abs=tolerance)


SAMPLINGS = {
    "plain": Sampling(max_new_tokens=12),
    "greedy": Sampling(max_new_tokens=12, temperature=0.0),
    "everything": Sampling(
        max_new_tokens=12, min_new_tokens=3, temperature=1.3, top_k_tokens=60, top_p=0.9, min_p=0.01, stop=("e", "zz")
    ),
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_engine_gives_the_oracles_completions(loaded, sampling):
    assert_same(run(Engine, loaded, sampling), run(NaiveGenerator, loaded, sampling))


def test_greedy_equals_transformers_generate(loaded):
    model, tokenizer = loaded
    sampling = Sampling(max_new_tokens=20, temperature=0.0)
    for group in run(Engine, loaded, sampling, group_size=1):
        out = model.generate(
            torch.tensor([group.prompt.ids]), max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        assert group.completions[0].ids == tuple(out[0, len(group.prompt.ids) :].tolist())


@pytest.fixture(scope="module")
def llama(tiny):
    return load_policy(tiny)


@pytest.mark.parametrize("longest", [24, pytest.param(260, marks=pytest.mark.slow)])
def test_a_completion_depends_on_its_own_seed_alone(loaded, longest):
    """Bit for bit the same in one batch, one at a time, with rows refilled, in a smaller group, with other prompts."""
    if longest > 128 and loaded[0].config.model_type not in ("llama", "gemma2"):
        pytest.skip("long completions on two architectures: plain attention, and windows with a soft cap")
    generator = torch.Generator().manual_seed(3)
    sizes = [1, 2, 9, 3, 30, 17, 2, 61] if longest == 24 else [7, 230, 120]
    prompts = [Prompt(ids=tuple(torch.randint(3, 260, (n,), generator=generator).tolist()), text="p") for n in sizes]

    def sample(prompts=prompts, group_size=5, **kwargs):
        sampling = Sampling(max_new_tokens=longest, temperature=1.5)
        groups = run(Engine, loaded, sampling, prompts=prompts, group_size=group_size, **kwargs)
        return [group.completions for group in groups]

    whole = sample()
    assert len({len(c.ids) for members in whole for c in members}) >= 3
    assert sample(budget=Budget(max_rows=7)) == whole
    if longest == 24:
        assert sample(budget=Budget(max_rows=1), prompts=prompts[:3]) == whole[:3]
    assert sample(group_size=2) == [members[:2] for members in whole]
    assert sample(prompts=prompts[:2]) == whole[:2]
    assert sample(prompts=prompts[:1], seed=8) != whole[:1]


def test_the_samplers_logprobs_are_the_training_passes(loaded):
    model, _ = loaded
    sampling = Sampling(max_new_tokens=24, temperature=1.3)
    groups = run(Engine, loaded, sampling, group_size=4)
    batch = Batch.collate([(group.prompt.ids, c.ids) for group in groups for c in group.completions])
    with torch.no_grad():
        (trained,) = completion_logprobs(model, batch, temperature=1.3)
    sampled = torch.tensor([logp for group in groups for c in group.completions for logp in c.sampler_logp])
    assert float((trained[batch.mask] - sampled).abs().max()) < 1e-4


def test_in_bfloat16_they_are_close(tiny):
    model, tokenizer = load_policy(tiny, dtype=torch.bfloat16)
    groups = run(Engine, (model, tokenizer), Sampling(max_new_tokens=24), group_size=8)
    batch = Batch.collate([(group.prompt.ids, c.ids) for group in groups for c in group.completions])
    with torch.no_grad():
        (trained,) = completion_logprobs(model, batch, temperature=1.0)
    sampled = torch.tensor([logp for group in groups for c in group.completions for logp in c.sampler_logp])
    gap = (trained[batch.mask] - sampled).abs()
    assert float(gap.mean()) < 0.05
    assert float(gap.mean()) < 0.1 * float(sampled.std())


def test_the_same_in_a_model_large_enough_for_several_threads():
    base = load_policy("base")
    generator = torch.Generator().manual_seed(4)
    sizes = [40, 3, 17, 25, 9, 31, 12, 50, 22]
    prompts = [Prompt(ids=tuple(torch.randint(5, 4000, (n,), generator=generator).tolist()), text="p") for n in sizes]
    sampling = Sampling(max_new_tokens=20)
    whole = run(Engine, base, sampling, prompts=prompts, group_size=9)
    for rows in (20, 33):
        assert run(Engine, base, sampling, prompts=prompts, group_size=9, budget=Budget(max_rows=rows)) == whole


def test_each_prompt_is_computed_and_kept_once(llama, monkeypatch):
    run_tokens = []
    forward = llama[0].base_model.forward
    engine = Engine(*llama)

    def spy(position_ids, **kwargs):
        run_tokens.append(position_ids.numel())
        return forward(position_ids=position_ids, **kwargs)

    monkeypatch.setattr(llama[0].base_model, "forward", spy)
    prompts = [Prompt(ids=tuple(range(3, 67)), text="p"), Prompt(ids=tuple(range(66, 2, -1)), text="p")]
    sampling = Sampling(max_new_tokens=16, min_new_tokens=16)
    engine.generate(make_requests(prompts, group_size=8, seed=0), sampling=sampling)
    assert run_tokens == [2 * 64] + [2 * 8] * 15
    per_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes
    assert engine.figures()["sampling/cache_gib"] * 2**30 == (2 * 64 + 2 * 8 * 16) * per_token


def test_the_budget_bounds_rows_and_memory(llama):
    """600 completions through 16 rows and a megabyte, each as it is without a bound."""
    sampling = Sampling(max_new_tokens=12, temperature=2.0)
    prompts = [Prompt(ids=(0, 70 + i, 80), text="p") for i in range(60)]
    asked = make_requests(prompts, group_size=10, seed=7)
    free = Engine(*llama).generate(asked, sampling=sampling)
    engine = Engine(*llama, budget=Budget(max_rows=16))
    assert engine.generate(asked, sampling=sampling) == free
    figures = engine.figures()
    assert figures["sampling/slot_occupancy"] > 0.8
    small = Engine(*llama, budget=Budget(cache_gib=2**-14))
    assert small.generate(asked, sampling=sampling) == free
    assert small.figures()["sampling/cache_gib"] <= 2**-14 < engine.figures()["sampling/cache_gib"] * 2


class NoWaiting(TorchDispatchMode):
    """Fails at whatever would wait for a device, or give a shape that depends on what a tensor holds."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert not name.startswith(self.FORBIDDEN), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS.keys())
def test_steps_as_they_are_captured_on_cuda(loaded, sampling, monkeypatch):
    """Shapes in a few sizes, several steps between two looks, nothing that waits: the same completions."""
    shapes = set()

    class Step:
        def __init__(self, step):
            self.step = step

        def __call__(self, seating):
            shapes.add(seating.shape)
            with NoWaiting():
                self.step(seating)

    expected = run(NaiveGenerator, loaded, sampling)
    monkeypatch.setattr(scheduler, "graphed", lambda *_: True)
    monkeypatch.setattr(scheduler, "GraphedStep", Step)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert_same(run(Engine, loaded, sampling, budget=Budget(max_rows=4)), expected)
    assert_same(run(Engine, loaded, sampling), expected)
    assert {shape.rows for shape in shapes} <= {1, 2, 4, 8, 9}
    assert len(shapes) <= 10


def test_rows_and_slots_by_hand():
    """16-byte tokens: a row and its share of a prompt take 16 * (32 + 1.25 * 64 / 4) = 832 bytes."""
    size = {"slot_tokens": 64, "row_tokens": 32, "token_bytes": 16}
    assert rows_and_slots(40, 10, max_rows=99, cache_bytes=8320, **size) == (10, 4)
    assert rows_and_slots(40, 10, max_rows=99, cache_bytes=10**9, **size) == (40, 10)
    assert rows_and_slots(40, 10, max_rows=1, cache_bytes=10**9, **size) == (1, 1)
    assert rows_and_slots(40, 10, max_rows=9, cache_bytes=1, **size) == (1, 1)
    assert rows_and_slots(10, 10, max_rows=4, cache_bytes=10**9, **size) == (4, 4)
    # groups of 2.5 on average: 16 * (32 + 1.25 * 64 / 2.5) = 1024 bytes, and 1.25 * 10 / 2.5 slots
    assert rows_and_slots(25, 10, max_rows=99, cache_bytes=10240, **size) == (10, 5)


def test_prompts_of_unlike_lengths_are_in_different_bands():
    lengths = [10, 500, 17, 400, 90, 16]
    assert bands(lengths, torch.device("cpu")) == [[1, 3], [4], [2, 5, 0]]


def test_a_prompt_drawn_twice_gets_completions_of_its_own(llama):
    first, second = run(Engine, llama, Sampling(max_new_tokens=12), prompts=[PROMPTS[0]] * 2)
    assert {c.ids for c in first.completions}.isdisjoint({c.ids for c in second.completions})


def test_logprobs_are_those_of_the_distribution_that_sampled(llama):
    """Probabilities over a truncated distribution: a completion drawn with top_k_tokens = 1 was certain."""
    group = run(Engine, llama, Sampling(max_new_tokens=6, top_k_tokens=1), group_size=1)[0]
    assert group.completions[0].sampler_logp == pytest.approx([0.0] * len(group.completions[0].ids), abs=1e-6)


def test_several_end_tokens(llama):
    model, _tokenizer = llama
    sampling = Sampling(max_new_tokens=40, temperature=2.0)
    model.generation_config.eos_token_id = list(range(1, 60))
    try:
        groups = run(Engine, llama, sampling)
        assert_same(groups, run(NaiveGenerator, llama, sampling))
    finally:
        model.generation_config.eos_token_id = 1
    ended = [c for g in groups for c in g.completions if c.finish_reason is FinishReason.EOS]
    assert len({c.ids[-1] for c in ended}) > 1
    for completion in ended:
        assert all(not 1 <= i < 60 for i in completion.ids[:-1])


def test_minimum_length_and_length_limit(llama):
    groups = run(Engine, llama, Sampling(max_new_tokens=9, min_new_tokens=9, temperature=3.0))
    for completion in (c for g in groups for c in g.completions):
        assert len(completion.ids) == 9
        assert 1 not in completion.ids
        assert completion.finish_reason is FinishReason.LENGTH


def test_stop_string_is_the_end_of_the_text(llama):
    groups = run(Engine, llama, Sampling(max_new_tokens=60, temperature=3.0, stop=("e", "t", "a", "o")), group_size=8)
    stopped = [c for g in groups for c in g.completions if c.finish_reason is FinishReason.STOP]
    assert stopped
    for completion in stopped:
        assert completion.text[-1] in "etao"
        assert not set(completion.text[:-1]) & set("etao")


def test_weights_are_loaded_whole_or_not_at_all(llama, tiny_models):
    engine = Engine(*load_policy(tiny_models["llama"]))
    other, _ = load_policy(tiny_models["llama"])
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    with pytest.raises(ValueError, match="do not fit"):
        engine.load_weights(1, iter([("lm_head.weight", torch.zeros(1))]))
    last = list(dict(other.named_parameters()))[-1]
    misshapen = ((name, p[:1] if name == last else p) for name, p in other.named_parameters())
    untouched = [p.detach().clone() for p in engine.model.parameters()]
    with pytest.raises(ValueError, match=f"do not fit.*{last}"):
        engine.load_weights(1, misshapen)
    assert all(torch.equal(a, b) for a, b in zip(untouched, engine.model.parameters(), strict=True))
    assert engine.version == 0
    asked, sampling = make_requests(PROMPTS, group_size=1, seed=0), Sampling(max_new_tokens=5)
    before = engine.generate(asked, sampling=sampling)
    assert before[0].completions[0].weights_version == 0
    engine.load_weights(3, other.named_parameters())
    after = engine.generate(asked, sampling=sampling)
    assert after[0].completions[0].weights_version == 3
    expected = Engine(other, llama[1])
    expected.load_weights(3, other.named_parameters())
    assert_same(after, expected.generate(asked, sampling=sampling))


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])  # with tied embeddings and without
def test_the_oracle_takes_weights_as_the_engine_does(tiny_models, architecture):
    model, tokenizer = load_policy(tiny_models[architecture])
    other, _ = load_policy(tiny_models[architecture])
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    oracle = NaiveGenerator(model, tokenizer)
    oracle.load_weights(2, other.named_parameters())
    assert oracle.version == 2
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_diverged_policy_is_an_error_not_a_sample(tiny_models):
    model, tokenizer = load_policy(tiny_models["llama"])
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(GuardError, match="not finite"):
        run(Engine, (model, tokenizer), Sampling(max_new_tokens=3))


def test_groups_are_told_as_they_finish_and_are_those_that_are_given(llama):
    model, tokenizer = llama
    told = []
    engine = Engine(model, tokenizer, budget=Budget(max_rows=4), finished=told.append)
    prompts = [Prompt(ids=tuple(range(70, 70 + n)), text="") for n in (3, 5, 40, 4)]
    groups = engine.generate(make_requests(prompts, group_size=3, seed=0), sampling=Sampling(max_new_tokens=6))
    assert sorted(map(id, told)) == sorted(map(id, groups))
    assert [id(group) for group in told] != [id(group) for group in groups]  # the longest prompt is a band of its own
