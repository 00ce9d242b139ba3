"""The options of the policy's loss in a step of GRPO and PPO: weights, masks, passes, the entropy's state."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers import Frozen, FunctionScorer, gradient, group, rollouts, scored
from tether.algorithms import grpo, ppo
from tether.algorithms.optimise import Optim
from tether.algorithms.policy_update import accumulate_minibatch
from tether.algorithms.surrogate import Surrogate, surrogate_of
from tether.errors import ConfigError
from tether.generation.engine import Engine
from tether.models.loading import load_policy
from tether.models.reference import reference_of
from tether.models.trainable import trainable
from tether.ops.losses import LossInputs, LossTerms
from tether.runtime.state import RunState, Snapshot, restore
from tether.types import Prompt, Sampling
from tether.world import ALONE

SAMPLING = Sampling(max_new_tokens=6)
PROMPTS = [Prompt(ids=(0, 70 + i), text=str(i)) for i in range(4)]
MODULES = {"grpo": grpo, "ppo": ppo}


def letters(_, completion):
    return sum(i < 130 for i in completion.ids) / len(completion.ids)


class Noisy:
    """A sampler whose weights are nearly the policy's, as those of an engine in another precision."""

    def __init__(self, model, tokenizer, *, noise=0.02):
        own = copy.deepcopy(model)
        torch.manual_seed(0)
        self.noise = {name: noise * torch.randn_like(weight) for name, weight in trainable(own).items()}
        self.engine = Engine(own, tokenizer)
        self.load_weights(0, trainable(model).items())

    def load_weights(self, version, weights):
        self.engine.load_weights(version, [(name, weight + self.noise[name]) for name, weight in weights])

    def generate(self, requests, *, sampling):
        return self.engine.generate(requests, sampling=sampling)

    def figures(self):
        return self.engine.figures()


def setting(tiny, module, sampler=Engine, **options):
    model, tokenizer = load_policy(tiny)
    config = module.Config(**{"group_size": 4, "sampling": SAMPLING, "optim": Optim(learning_rate=1e-2), **options})
    state = module.State.create(model, config, reference=reference_of(model), prompts=4, total_steps=9, seed=0)
    return state, sampler(model, tokenizer), config


def step(module, state, generator, config, **given):
    scorer = FunctionScorer(letters)
    return module.step(state, PROMPTS, generator=generator, scorer=scorer, config=config, **given)


# -- weights against the sampler's mismatch ----------------------------------------------------------------------------


def test_the_weights_multiply_the_surrogate_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    names = ("logp", "old_logp", "sampler_logp", "ref_logp", "entropy", "advantages")
    tensors = {name: torch.randn(3, 4, generator=generator) for name in names}
    inputs = LossInputs(**tensors, mask=torch.ones(3, 4, dtype=torch.bool))
    plain = surrogate_of(inputs, Surrogate())
    found = surrogate_of(inputs, Surrogate(mismatch="tis", mismatch_cap=1.5))
    weights = (inputs.old_logp - inputs.sampler_logp).exp()
    torch.testing.assert_close(found.loss, weights.clamp(max=1.5) * plain.loss)
    assert torch.equal(found.clipped, plain.clipped)
    figures = {name.rpartition("/")[2]: values for name, values in found.figures.items()}
    torch.testing.assert_close(figures["mean"], weights.clamp(max=1.5))
    assert torch.equal(figures["capped"], weights > 1.5)
    assert plain.figures == {}


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_the_figures_are_those_of_trainer_and_sampler(tiny, module):
    surrogate = Surrogate(mismatch="tis", mismatch_cap=1.02)
    state, sampler, config = setting(tiny, module, Noisy, surrogate=surrogate, epochs_per_step=1)
    policy = copy.deepcopy(state.policy)
    result = step(module, state, sampler, config)
    update = module.collect(
        module.State.create(policy, config, reference=reference_of(policy), prompts=4, total_steps=9, seed=0),
        rollouts(result.groups),
        [],
        config=config,
        where="test",
        world=ALONE,
    )
    sampled = update.experience.sampled
    (logp,) = grpo.completion_logprobs(policy, sampled.batch, temperature=1.0)
    weights = (logp.detach() - sampled.sampler_logp).exp()[sampled.batch.mask]
    name = "sampling/importance_sampling_ratio"
    assert result.metrics[f"{name}/mean"] == pytest.approx(float(weights.clamp(max=1.02).mean()), abs=1e-5)
    assert result.metrics[f"{name}/capped"] == pytest.approx(float((weights > 1.02).float().mean()), abs=1e-6)
    assert 0.05 < result.metrics[f"{name}/capped"] < 0.95
    assert result.metrics["sampling/logprob_gap_mean"] > 1e-3


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["tis", "mis"])
def test_a_sampler_that_is_the_policy_needs_no_correction(tiny, kind, level):
    """The weights are 1, and the step lands where the plain one lands, but for rounding."""
    found = []
    for surrogate in (Surrogate(), Surrogate(mismatch=kind, mismatch_level=level)):
        state, engine, config = setting(tiny, grpo, surrogate=surrogate, optim=Optim(learning_rate=1e-3))
        metrics = step(grpo, state, engine, config).metrics
        found.append(torch.cat([weight.detach().flatten() for weight in state.policy.parameters()]))
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["sampling/importance_sampling_ratio/capped"] == 0
    torch.testing.assert_close(*found, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("surrogate", "epochs", "more"),
    [(Surrogate(mismatch="tis"), 1, 0), (Surrogate(mismatch="tis"), 2, 1), (Surrogate(policy_loss="sapo"), 2, 0)],
)
@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_no_option_takes_a_pass_of_the_policy_more_but_a_correction_of_several_optimizer_steps_in_grpo(
    tiny, module, surrogate, epochs, more
):
    """PPO has the log-probs from the pass that gives its values, and counts the product of its head."""
    passes, flops = [], []
    for options in ({}, {"surrogate": surrogate}):
        state, engine, config = setting(tiny, module, epochs_per_step=epochs, **options)
        counted = []
        result = step(module, state, engine, config)
        state.policy.base_model.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        given = rollouts(result.groups)
        update = module.collect(state, given, PROMPTS, config=config, where="test", world=ALONE)
        objective = grpo.objective if module is grpo else ppo.objective
        owner = state.policy if module is grpo else state
        module.learn(
            state, update, lambda part, f=objective, o=owner, c=config: f(o, part, c), module.plan_of(config),
            where="test", world=ALONE,
        )  # fmt: skip
        passes.append(len(counted))
        flops.append(result.metrics["flops/reference"])
    assert passes[1] - passes[0] == (more if module is grpo else 0)
    head = module is ppo and surrogate.mismatch != "off"
    assert (flops[1] > flops[0]) is bool(head or (more and module is grpo))


def test_a_loss_of_ones_own_sees_the_sampler_and_the_trainer(tiny):
    """With a correction of its own; the weights of the options are not applied to it."""
    seen = []

    def loss(inputs):
        seen.append(inputs)
        return LossTerms(loss=-inputs.advantages * (inputs.logp - inputs.old_logp).exp(), figures={})

    state, sampler, config = setting(tiny, grpo, Noisy, surrogate=Surrogate(mismatch="tis"))
    metrics = step(grpo, state, sampler, config, loss=loss).metrics
    (one,) = seen
    assert torch.equal(one.old_logp, one.logp.detach())
    assert (one.sampler_logp - one.old_logp)[one.mask].abs().max() > 1e-3
    assert "sampling/importance_sampling_ratio/mean" not in metrics


# -- completions cut at the length limit -------------------------------------------------------------------------------


def minibatch_gradient(tiny, groups, **options):
    model, _ = load_policy(tiny)
    config = grpo.Config(group_size=3, sampling=Sampling(max_new_tokens=9), **options)
    state = grpo.State.create(model, config, reference=reference_of(model), prompts=1, total_steps=1, seed=0)
    state.optimizer = Frozen(model)
    update = grpo.collect(state, rollouts(groups), [], config=config, where="test", world=ALONE)
    accumulate_minibatch(
        state, update.experience, lambda part: grpo.objective(model, part, config), grpo.plan_of(config), world=ALONE
    )
    return gradient(model).clone(), update.experience


GROUPS = [
    scored(group((0, 5), [(7, 8, 1), (9, 10, 11, 12), (13, 1)]), [1.0, 2.0, 4.0]),
    scored(group((0, 6), [(7, 8, 14), (9, 1), (13, 15, 16, 1)]), [0.5, 3.0, 1.0]),
]
CUT = [1, 3]
"""Rows without an EOS."""


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean", "fixed_length"])
def test_the_gradient_is_that_of_the_completions_that_ended(tiny, reduction):
    """By hand: their terms alone, with advantages of all; completions count in the denominator, tokens do not."""
    found, experience = minibatch_gradient(
        tiny, GROUPS, loss_reduction=reduction, surrogate=Surrogate(mask_truncated=True)
    )
    unmasked, plain = minibatch_gradient(tiny, GROUPS, loss_reduction=reduction)
    assert torch.equal(experience.advantages, plain.advantages)
    assert experience.sampled.learned.tolist() == [row not in CUT for row in range(6)]
    assert not torch.allclose(found, unmasked)
    model, _ = load_policy(tiny)
    config = grpo.Config(group_size=3, sampling=Sampling(max_new_tokens=9))
    total = torch.zeros(())
    ended = torch.tensor([row for row in range(6) if row not in CUT])
    tokens = int(plain.sampled.batch.mask[ended].sum())
    for row in ended:
        inputs, terms = grpo.objective(model, plain.rows(row.view(1)), config)
        own = terms.loss[inputs.mask]
        total = total + {"sequence_mean": own.mean() / 6, "token_mean": own.sum() / tokens}.get(
            reduction, own.sum() / (6 * 9)
        )
    total.backward()
    torch.testing.assert_close(found, gradient(model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_a_step_whose_completions_were_all_cut_moves_nothing(tiny, module):
    """None has an EOS: whatever their rewards, the gradient is 0, and PPO's values are not fitted to them."""
    options = {"surrogate": Surrogate(mask_truncated=True), "entropy_coef": 0.1}
    state, engine, config = setting(tiny, module, sampling=Sampling(max_new_tokens=2), **options)
    before = [weight.detach().clone() for weight in state.policy.parameters()]
    result = step(module, state, engine, config)
    assert result.metrics["completions/clipped_ratio"] == 1
    assert result.metrics["grad_norm"] == result.metrics["loss"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, state.policy.parameters(), strict=True))


def test_ppo_fits_policy_and_values_to_completions_that_ended_alone(tiny):
    """The gradient of one cut completion among others is that without it, times the tokens that count."""
    model, _ = load_policy(tiny)
    found = {}
    for masked in (True, False):
        config = ppo.Config(
            group_size=3,
            whiten_advantages=False,
            entropy_coef=0.1,
            sampling=SAMPLING,
            surrogate=Surrogate(mask_truncated=masked),
        )
        state = ppo.State.create(model, config, reference=reference_of(model), prompts=1, total_steps=1, seed=0)
        state.optimizer = Frozen(model)
        torch.nn.init.constant_(state.critic.head.weight, 0.01)
        update = ppo.collect(state, rollouts(GROUPS), [], config=config, where="test", world=ALONE)
        experience = update.experience
        if not masked:
            experience = experience.rows(torch.tensor([row for row in range(6) if row not in CUT]))
        model.zero_grad()
        accumulate_minibatch(
            state,
            experience,
            lambda part, s=state, c=config: ppo.objective(s, part, c),
            ppo.plan_of(config),
            world=ALONE,
        )
        found[masked] = gradient(model).clone()
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-6)
    assert found[True].abs().max() > 1e-3


# -- the entropy bonus and its target ----------------------------------------------------------------------------------


def test_the_coefficient_rises_while_the_entropy_is_below_its_target_and_raises_it(tiny):
    state, engine, config = setting(tiny, grpo, entropy_target=50.0, entropy_step=0.5)
    plain, other, without = setting(tiny, grpo)
    rows = [step(grpo, state, engine, config).metrics for _ in range(4)]
    bare = [step(grpo, plain, other, without).metrics for _ in range(4)]
    assert [row["entropy_coef"] for row in rows] == [0.0, 0.5, 1.0, 1.5]
    assert [row["entropy_coef"] for row in bare] == [0.0] * 4
    assert rows[0]["entropy"] == bare[0]["entropy"]
    assert rows[3]["entropy"] > bare[3]["entropy"] + 0.01
    assert state.entropy == rows[3]["entropy"]


def test_above_its_target_the_bonus_does_not_apply(tiny):
    state, engine, config = setting(tiny, grpo, entropy_target=0.1, entropy_coef=1.0, entropy_step=0.25)
    rows = [step(grpo, state, engine, config).metrics for _ in range(2)]
    assert [row["entropy_coef"] for row in rows] == [0.0, 0.0]
    assert state.entropy_coef == 0.5


def test_a_restored_state_takes_the_same_steps(tiny, tmp_path):
    """The coefficient and the entropy that decides on it are in the checkpoint: without them the next step differs."""
    options = {
        "entropy_target": 50.0,
        "entropy_step": 0.5,
        "epochs_per_step": 2,
        "surrogate": Surrogate(policy_loss="cispo", mismatch="mis", mask_truncated=True),
    }
    state, sampler, config = setting(tiny, grpo, Noisy, **options)
    for _ in range(2):
        step(grpo, state, sampler, config)
    Snapshot.of(RunState(state), copy=True).write(tmp_path)
    resumed, again, _ = setting(tiny, grpo, Noisy, **options)
    restore(RunState(resumed), tmp_path)
    again.load_weights(2, trainable(resumed.policy).items())
    assert (resumed.entropy_coef, resumed.entropy) == (state.entropy_coef, state.entropy)
    for _ in range(2):
        first, second = step(grpo, state, sampler, config).metrics, step(grpo, resumed, again, config).metrics
        assert first["entropy_coef"] == second["entropy_coef"] > 0
        for name in ("loss", "entropy", "grad_norm", "sampling/importance_sampling_ratio/mean"):
            assert first[name] == second[name]
    for a, b in zip(state.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(a, b)


# -- advantages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 1, "advantage_baseline": "batch", "advantage_scale": "batch"},
        {"advantage_baseline": "batch", "advantage_scale": "none"},
        {"pass_at_k": 2},
        {"positive_only": True},
        {"surrogate": Surrogate(policy_loss="cispo"), "epochs_per_step": 2},
        {"surrogate": Surrogate(policy_loss="sapo"), "epochs_per_step": 2},
    ],
    ids=["reinforce++", "batch", "pass@2", "positive", "cispo", "sapo"],
)
def test_a_few_steps_raise_the_reward(tiny, options):
    state, engine, config = setting(tiny, grpo, **{"kl_coef": 0.001, "group_size": 8, **options})
    rewards = [step(grpo, state, engine, config).metrics["reward"] for _ in range(9)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.05


def test_positive_only_keeps_the_advantages_above_zero_and_the_whole_kl():
    scores, log_ratio = torch.tensor([[1.0, 2.0, 6.0]]), torch.randn(3, 2)
    for kl_coef in (0.0, 0.3):
        config = grpo.Config(group_size=3, kl_coef=kl_coef, advantage_scale="none", positive_only=True)
        plain = grpo.Config(group_size=3, kl_coef=kl_coef, advantage_scale="none")
        found, weight, _ = grpo.advantages_of(scores, log_ratio, config, ALONE)
        both, same, _ = grpo.advantages_of(scores, log_ratio, plain, ALONE)
        torch.testing.assert_close(found - both, torch.tensor([[2.0, 1.0, 0.0]]))
        assert torch.equal(weight, same)


def test_the_kl_has_the_baseline_of_the_rewards():
    """That of the batch: weights of grad log pi that add up to zero over the batch, and not over each group."""
    config = grpo.Config(
        group_size=3, kl_coef=1.0, advantage_baseline="batch", advantage_scale="none", kl_estimator="k2"
    )
    log_ratio = torch.randn(6, 4)
    values, _, _ = grpo.advantages_of(torch.zeros(2, 3), log_ratio, config, ALONE)
    left = log_ratio.sum(1).view(2, 3) - values
    assert left.sum().item() == pytest.approx(0, abs=1e-4)
    assert left.sum(1).abs().min() > 0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: grpo.Config(group_size=1), "group_size must be at least 2"),
        (lambda: grpo.Config(advantage_baseline="batch"), "requires advantage_scale batch or none"),
        (lambda: grpo.Config(group_size=4, pass_at_k=0), "pass_at_k"),
        (
            lambda: grpo.Config(group_size=1, advantage_baseline="batch", advantage_scale="none", dynamic_sampling=1),
            "dynamic_sampling needs a group_size of at least 2",
        ),
        (lambda: grpo.Config(entropy_target=0.0), "entropy_target"),
        (lambda: Surrogate(clip_low=0.0), "clip_low"),
        (lambda: Surrogate(clip_dual=3.0, policy_loss="sapo"), "clip_dual is for policy_loss clip"),
        (lambda: Surrogate(mismatch_cap=0.0), "mismatch_cap"),
        (lambda: Surrogate(policy_loss="vespo"), "policy_loss must be one of clip, cispo, sapo"),
    ],
)
def test_options_that_cannot_work(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
