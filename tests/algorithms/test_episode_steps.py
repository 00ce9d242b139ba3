"""Two turns with an environment between them, and a reward at each: the exact optimum, the journal and the discount."""

from __future__ import annotations

import random

import pytest
import torch

from enumerable import PROMPT, Space, tiny_llama, total_variation
from optima import BETA, RATE, SEED, TOLERANCE, VOCAB, train
from tether.algorithms import grpo, ppo
from tether.algorithms.optimise import Optim
from tether.generation.engine import Engine
from tether.generation.environment import Observation
from tether.generation.episodes import Episodes
from tether.models.loading import load_policy
from tether.models.reference import reference_of
from tether.ops.returns import discounted_returns, gae, turn_discounts
from tether.rewards.combine import WeightedSum
from tether.rewards.episode import EpisodeReward, judgement
from tether.rewards.function import FunctionReward, as_given
from tether.runtime.directory import RunDirectory, rollout_table
from tether.runtime.journal import Journal, JournaledGenerator
from tether.types import Completion, FinishReason, Prompt, Sampling, Turn, make_requests
from tiny import byte_tokenizer

TEXTS = ["", "", "", *'!"#$%']
"""Of the eight tokens, three of which are special."""
IDS = {"!": (3,), '"#': (4, 5), "": ()}


def worth(*actions: str) -> float:
    """The reward of a turn, after which the policy has said this."""
    return random.Random("|".join(actions)).uniform(-0.4, 0.4)


class TwoTurns:
    """Shows one token, two or none, by what was said."""

    def reset(self, prompt, *, seed):
        self.said = []
        return Observation()

    def step(self, action):
        self.said.append(action)
        text = shown(action)
        done = len(self.said) == 2
        return Observation(text=text, reward=worth(*self.said), done=done, info={"turn": len(self.said)})


class Shows(TwoTurns):
    """Shows something at once too."""

    def reset(self, prompt, *, seed):
        super().reset(prompt, seed=seed)
        return Observation(text="now")


def shown(action: str) -> str:
    return {"": "!", "!": '"#', '"': ""}.get(action, '"#')


def space() -> Space:
    """Every episode, with what it is worth."""
    found, rewards = [], []
    for first in range(VOCAB):
        between = IDS[shown(TEXTS[first])]
        for second in range(VOCAB):
            mask = (True, *[False] * len(between), True)
            found.append(((first, *between, second), mask))
            rewards.append(worth(TEXTS[first]) + worth(TEXTS[first], TEXTS[second]))
    completions, masks = zip(*found, strict=True)
    return Space(completions, masks, torch.tensor(rewards, dtype=torch.float64))


SCORER = WeightedSum(((EpisodeReward("env"), 1.0),))


def player(model):
    return Engine(model, byte_tokenizer(), episodes=Episodes(make=TwoTurns, turn_tokens=1))


class Judged(Space):
    """The space, as training sees it: scored by what the environment said."""

    def score(self, groups):
        return SCORER.score(groups)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "options"),
    [(ppo, {"discount": "turn"}), (grpo, {"advantage_scale": "none", "kl_estimator": "k2"})],
    ids=["ppo", "grpo"],
)
def test_two_turns_with_a_reward_at_each_land_on_the_exact_optimum(algorithm, options):
    problem = space()
    with torch.no_grad():
        reference = problem.logprobs(tiny_llama(VOCAB, seed=SEED))
    assert reference.exp().sum().item() == pytest.approx(1, abs=1e-5)
    optimum = problem.reverse_optimum(reference, BETA)
    assert total_variation(optimum, reference.exp()) > 4 * TOLERANCE
    judged = Judged(problem.completions, problem.masks, problem.rewards)
    found = train(algorithm, judged, generator=player, length=4, steps=100, rate=2 * RATE, **options)
    assert total_variation(found, optimum) < TOLERANCE


def test_what_an_episode_is_worth():
    model = tiny_llama(VOCAB, seed=SEED)
    prompts = [Prompt(ids=PROMPT, text="")]
    groups = player(model).generate(make_requests(prompts, group_size=16, seed=0), sampling=Sampling(max_new_tokens=4))
    problem = space()
    table = dict(zip(problem.completions, problem.rewards.tolist(), strict=True))
    (scored,) = SCORER.score(groups)
    for completion, score in zip(scored.rollouts.completions, scored.scores, strict=True):
        assert score.total == pytest.approx(table[completion.ids])
        first, last = completion.turns
        assert score.token_rewards[first.stop - 1] == first.reward
        assert score.token_rewards[last.stop - 1] == last.reward
        assert score.parts == {"env": pytest.approx(score.total), "env/turn": 2.0}
    row = rollout_table(1, [scored]).to_pylist()[0]
    assert row["turn_rewards"] == [turn.reward for turn in scored.rollouts.completions[0].turns]


def test_a_completion_that_is_no_episode_has_no_reward_of_one():
    one = Completion(
        ids=(5,), mask=(True,), sampler_logp=(-1.0,), finish_reason=FinishReason.EOS, text="x", weights_version=0
    )
    assert judgement(one).value is None


def test_other_rewards_see_all_of_a_conversation():
    messages = ({"role": "assistant", "content": "a"}, {"role": "user", "content": "b"})
    one = Completion(
        ids=(5, 6), mask=(True, True), sampler_logp=(-1.0, -1.0), finish_reason=FinishReason.DONE, text="ab",
        weights_version=0, turns=(Turn(start=0, stop=2, reward=1.0),), messages=messages,
    )  # fmt: skip
    assert as_given(Prompt(ids=(1,), text="", messages=messages[1:]), one) == list(messages)


def test_the_discount_of_turns_by_hand():
    """Turns of two, one and two tokens, gamma 0.5, with an environment's token after the first."""
    mask = torch.tensor([[True, True, False, True, True, True], [True, True, True, False, False, False]])
    gammas = turn_discounts([[2, 4, 6], [3]], mask, gamma=0.5)
    assert gammas.tolist() == [[1, 0.5, 1, 0.5, 1, 0.5], [1, 1, 0.5, 1, 1, 1]]
    rewards = torch.tensor([[0.0, 1.0, 9.0, 2.0, 0.0, 4.0], [0.0, 0.0, 3.0, 9.0, 9.0, 9.0]])
    returns = discounted_returns(rewards, mask, gamma=gammas)
    assert returns.tolist() == [[3.0, 3.0, 0.0, 4.0, 4.0, 4.0], [3.0, 3.0, 3.0, 0.0, 0.0, 0.0]]
    advantages, found = gae(rewards, torch.zeros_like(rewards), mask, gamma=gammas, lam=1.0)
    assert torch.equal(found, returns)
    assert torch.equal(advantages, returns)
    everywhere = torch.full_like(rewards, 0.7)
    values = torch.randn(rewards.shape, generator=torch.Generator().manual_seed(0))
    for one, other in zip(
        gae(rewards, values, mask, gamma=0.7, lam=0.9),
        gae(rewards, values, mask, gamma=everywhere, lam=0.9),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_the_journal_keeps_episodes(tiny, tmp_path):
    model, tokenizer = load_policy(tiny)
    directory = RunDirectory(tmp_path / "run", {})
    directory.make()
    requests = make_requests([Prompt(ids=(0, 9), text="p", columns={"x": 1})], group_size=3, seed=0)
    engine = Engine(model, tokenizer, episodes=Episodes(make=Shows, turn_tokens=2))
    found = []
    for _ in range(2):
        journal = Journal(directory)
        journal.begin(1)
        found.append(JournaledGenerator(engine, journal).generate(requests, sampling=Sampling(max_new_tokens=9)))
        engine.episodes = None  # the second time nothing is played
    assert found[0] == found[1]
    assert found[1][0].prompt.text == "pnow"
    assert all(completion.turns for completion in found[1][0].completions)


@pytest.mark.parametrize("algorithm", [ppo, grpo])
def test_a_step_of_episodes_in_a_loop_of_ones_own(algorithm, tiny):
    model, tokenizer = load_policy(tiny)
    prompts = [Prompt(ids=(0, 9), text="p"), Prompt(ids=(0, 8, 7), text="q")]
    config = algorithm.Config(group_size=4, sampling=Sampling(max_new_tokens=12), optim=Optim(learning_rate=1e-3))
    state = algorithm.State.create(model, config, reference=reference_of(model), prompts=2, total_steps=1, seed=0)
    engine = Engine(model, tokenizer, episodes=Episodes(make=Shows, turn_tokens=3))
    scorer = WeightedSum(((EpisodeReward("env"), 1.0), (FunctionReward("one", lambda completions: [1.0] * 8), 0.5)))
    result = algorithm.step(state, prompts, generator=engine, scorer=scorer, config=config)
    assert result.metrics["sampling/logprob_gap_max"] < 1e-4
    assert 1 <= result.metrics["episodes/turns"] <= 2
    assert result.metrics["episodes/shown_tokens"] > 0
    assert result.metrics["rewards/one/mean"] == 1.0
    assert "rewards/env/turn/mean" in result.metrics
