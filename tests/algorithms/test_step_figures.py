"""What a step says of each token: the log-prob under the reference, and the advantage as the loss had it."""

from __future__ import annotations

import math

import pytest
import torch

from enumerable import tiny_llama
from helpers import FunctionScorer
from tether.algorithms import grpo, ppo, sft
from tether.algorithms import rejection_sampling as rs
from tether.algorithms.optimise import Optim
from tether.generation.engine import Engine
from tether.models.loading import load_policy
from tether.models.reference import reference_of
from tether.ops.divergence import k3
from tether.types import Prompt, Sampling, Score, ScoredGroup, make_requests
from two_turns import TwoTurns

SAMPLING = Sampling(max_new_tokens=5)
PROMPTS = [Prompt(ids=(0, 70 + i), text=str(i)) for i in range(3)]
OPTIM = Optim(learning_rate=1e-2)


class Scorer:
    """The share of odd ids; no reward for the first completion of the second prompt."""

    def score(self, groups):
        return [
            ScoredGroup(
                rollouts=group,
                scores=tuple(
                    Score(total=None if (i, j) == (1, 0) else sum(n % 2 for n in one.ids) / len(one.ids))
                    for j, one in enumerate(group.completions)
                ),
            )
            for i, group in enumerate(groups)
        ]


def logprobs(model, prompt, completion) -> list[float]:
    """Token by token from the library's own logits."""
    ids = torch.tensor([[*prompt.ids, *completion.ids]])
    with torch.no_grad():
        logp = model(input_ids=ids).logits[0].log_softmax(-1)
    return [float(logp[len(prompt.ids) - 1 + t, token]) for t, token in enumerate(completion.ids)]


def stepped(module, tiny, **options):
    """The second step's result, where the policy has left its reference, and the reference."""
    model, tokenizer = load_policy(tiny)
    reference, _ = load_policy(tiny)
    tuning = {"sft": sft.Config(optim=OPTIM)} if module is rs else {"optim": OPTIM}
    config = module.Config(group_size=3, sampling=SAMPLING, **tuning, **options)
    steps = {} if module is rs else {"total_steps": 2}
    state = module.State.create(model, config, reference=reference, prompts=len(PROMPTS), seed=0, **steps)
    engine = Engine(model, tokenizer)
    for _ in range(2):
        result = module.step(state, PROMPTS, generator=engine, scorer=Scorer(), config=config)
    return result, reference, model, engine


def rows(result):
    """Prompt, completion, score and figures of every completion."""
    assert [len(group.rollouts.completions) for group in result.groups] == [len(one) for one in result.figures]
    for group, figures in zip(result.groups, result.figures, strict=True):
        yield from zip(
            [group.rollouts.prompt] * len(figures), group.rollouts.completions, group.scores, figures, strict=True
        )


@pytest.mark.parametrize("module", [grpo, ppo, rs], ids=["grpo", "ppo", "rejection-sampling"])
def test_log_probs_under_the_reference(tiny, module):
    result, reference, _, _ = stepped(module, tiny)
    for prompt, completion, _, figures in rows(result):
        assert figures.ref_logp == pytest.approx(logprobs(reference, prompt, completion), abs=1e-4)
    d = [math.fsum(completion.sampler_logp) - math.fsum(figures.ref_logp) for _, completion, _, figures in rows(result)]
    assert sum(d) / len(d) == pytest.approx(result.metrics["kl"], abs=1e-5)
    assert result.metrics["kl"] > 0.01


def test_the_advantage_of_a_group_at_each_of_its_tokens(tiny):
    result, *_ = stepped(grpo, tiny, kl_coef=0.0)
    for group, figures in zip(result.groups, result.figures, strict=True):
        totals = [score.total for score in group.scores if score.total is not None]
        mean = sum(totals) / len(totals)
        std = math.sqrt(sum((x - mean) ** 2 for x in totals) / (len(totals) - 1))
        for completion, score, one in zip(group.rollouts.completions, group.scores, figures, strict=True):
            expected = 0.0 if score.total is None or std < 1e-6 else (score.total - mean) / (std + 1e-4)
            assert one.advantages == pytest.approx([expected] * len(completion.ids), abs=1e-4)


def test_the_whitened_advantage_of_each_token(tiny):
    """With gamma = lam = 1, no KL and a critic that says 0, it is the score before whitening, at every token."""
    model, tokenizer = load_policy(tiny)
    config = ppo.Config(group_size=3, kl_coef=0.0, lam=1.0, sampling=SAMPLING)
    state = ppo.State.create(model, config, reference=reference_of(model), prompts=3, total_steps=1, seed=0)
    result = ppo.step(state, PROMPTS, generator=Engine(model, tokenizer), scorer=Scorer(), config=config)
    raw = [score.total for _, completion, score, _ in rows(result) for _ in completion.ids if score.total is not None]
    mean = sum(raw) / len(raw)
    std = math.sqrt(sum((x - mean) ** 2 for x in raw) / len(raw) + 1e-8)
    none = 0
    for _, completion, score, figures in rows(result):
        if score.total is None:
            none += 1
            assert figures.advantages is None
        else:
            assert figures.advantages == pytest.approx([(score.total - mean) / std] * len(completion.ids), abs=1e-4)
    assert none == 1


@pytest.mark.parametrize("module", [grpo, ppo], ids=["grpo", "ppo"])
def test_they_are_zero_where_an_environment_spoke(module):
    model = tiny_llama(8)
    config = module.Config(group_size=8, sampling=Sampling(max_new_tokens=1))
    state = module.State.create(model, config, reference=reference_of(model), prompts=1, total_steps=1, seed=0)
    scorer = FunctionScorer(lambda _, completion: len(completion.ids))
    prompts = [Prompt(ids=(0,), text="")]
    result = module.step(state, prompts, generator=TwoTurns(model), scorer=scorer, config=config)
    foreign = 0
    for _, completion, _, figures in rows(result):
        for own, reference, advantage in zip(completion.mask, figures.ref_logp, figures.advantages, strict=True):
            assert (reference != 0) == (advantage != 0) == own
            foreign += not own
    assert foreign


def test_the_kl_after_a_round_is_that_of_new_samples(tiny):
    result, reference, model, engine = stepped(rs, tiny)
    found = engine.generate(make_requests(PROMPTS, group_size=1, seed=rs.derive_seed(0, "after", 1)), sampling=SAMPLING)
    sums = []
    for group in found:
        (completion,) = group.completions
        d = torch.tensor(logprobs(model, group.prompt, completion)) - torch.tensor(
            logprobs(reference, group.prompt, completion)
        )
        sums.append(float(k3(d).sum()))
    assert result.metrics["kl/after"] == pytest.approx(sum(sums) / len(sums), rel=1e-3, abs=1e-5)
    assert result.metrics["kl/after"] > 0
