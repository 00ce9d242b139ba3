"""A loss, an optimizer and a reference of one's own."""

from __future__ import annotations

import runpy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from helpers import FunctionScorer, gradient, random_groups, rollouts
from interrupting import same
from tether.algorithms import grpo, ppo, sft
from tether.algorithms import rejection_sampling as rs
from tether.algorithms.optimise import Optim
from tether.algorithms.policy_update import accumulate_minibatch
from tether.errors import ConfigError
from tether.generation.engine import Engine
from tether.models.loading import load_policy
from tether.models.masters import master_of
from tether.models.reference import reference_of
from tether.observers import Alarm, Stop
from tether.ops.losses import LossTerms
from tether.ops.surrogates import clipped_surrogate
from tether.runtime.state import RunState, Snapshot, restore
from tether.types import Prompt, Sampling, StepResult
from tether.world import ALONE

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SAMPLING = Sampling(max_new_tokens=4)
PROMPTS = [Prompt(ids=(0, 70 + i), text=str(i)) for i in range(3)]
SCORER = FunctionScorer(lambda _, completion: sum(i % 2 for i in completion.ids) / len(completion.ids))


def surrogate(inputs):
    loss, clipped = clipped_surrogate(inputs.logp - inputs.old_logp, inputs.advantages, clip_low=0.2, clip_high=0.2)
    return LossTerms(loss=loss, figures={"mine/clipped": clipped})


def stepped(tiny, *, loss=None, **options):
    model, tokenizer = load_policy(tiny)
    config = grpo.Config(group_size=3, epochs_per_step=2, sampling=SAMPLING, optim=Optim(learning_rate=1e-2), **options)
    state = grpo.State.create(model, config, reference=reference_of(model), prompts=len(PROMPTS), total_steps=2, seed=0)
    engine = Engine(model, tokenizer)
    rows = [
        grpo.step(state, PROMPTS, generator=engine, scorer=SCORER, config=config, loss=loss).metrics for _ in range(2)
    ]
    return model, rows


def test_the_default_loss_given_as_ones_own_is_the_default_loss(tiny):
    (model, rows), (other, own) = stepped(tiny, kl_coef=0.3), stepped(tiny, kl_coef=0.3, loss=surrogate)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    for row, found in zip(rows, own, strict=True):
        assert found["loss"] == row["loss"]
        assert found["loss/kl"] == row["loss/kl"]
        assert found["mine/clipped"] == row["clip_ratio/region_mean"] > 0
        assert "clip_ratio/region_mean" not in found


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: LossTerms(loss=x.logp.sum(), figures={}), r"loss: the loss has the shape \[\], .* has \["),
        (lambda x: LossTerms(loss=x.logp, figures={"a": x.logp.mean(1)}), r"loss: a has the shape \[\d+\], "),
    ],
)
def test_a_loss_that_is_not_one_number_per_token_is_an_error(tiny, wrong, message):
    with pytest.raises(ConfigError, match=message):
        stepped(tiny, loss=wrong)


def test_on_policy_cispo_has_the_gradient_of_the_clipped_surrogate(tiny, monkeypatch):
    """Both are A grad log pi where the ratio is 1; a ratio above the bound keeps the bound as its weight."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = runpy.run_path(str(EXAMPLES / "own_loss.py"))
    cispo = example["cispo"]
    model, _ = load_policy(tiny)
    config = grpo.Config(group_size=3, kl_coef=0.0)
    state = grpo.State.create(model, config, reference=reference_of(model), prompts=2, total_steps=1, seed=0)
    groups = random_groups(2, 3)
    experience = grpo.collect(state, rollouts(groups), [], config=config, where="test", world=ALONE).experience
    (logp,) = grpo.completion_logprobs(model, experience.sampled.batch, temperature=1.0)

    def found(loss, shift):
        model.zero_grad()
        shifted = replace(experience, sampled=replace(experience.sampled, old_logp=logp.detach() - shift))
        objective = partial(grpo.objective, model, config=config, loss=loss)
        accumulate_minibatch(state, shifted, objective, grpo.plan_of(config), world=ALONE)
        return gradient(model)

    torch.testing.assert_close(found(cispo, 0.0), found(None, 0.0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found(cispo, 1.0), (1 + example["HIGH"]) * found(None, 0.0), rtol=1e-4, atol=1e-6)
    example["main"](2)


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.3),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=1e-3, momentum=0.5, centered=True),
    "adafactor": partial(torch.optim.Adafactor, lr=1e-2),
    "adam-amsgrad": partial(torch.optim.Adam, lr=1e-3, amsgrad=True),
    "rprop": partial(torch.optim.Rprop, lr=1e-4),
}


def state_of(module, tiny, optimizer, **options):
    model, tokenizer = load_policy(tiny)
    if module is rs:
        tuning = sft.Config(batch_size=1, epochs=2)
        config, steps = rs.Config(group_size=2, sampling=SAMPLING, sft=tuning), {}
    else:
        config, steps = module.Config(group_size=2, sampling=SAMPLING), {"total_steps": 4}
    state = module.State.create(
        model, config, reference=reference_of(model), prompts=3, seed=0, optimizer=optimizer, **steps, **options
    )
    engine = Engine(model, tokenizer)
    return state, lambda: module.step(state, PROMPTS, generator=engine, scorer=SCORER, config=config).metrics


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("module", [grpo, ppo], ids=["grpo", "ppo"])
def test_any_optimizer_of_torch_trains_and_resumes_from_a_checkpoint(tiny, tmp_path, module, make):
    state, step = state_of(module, tiny, make)
    before = [weight.clone() for weight in state.policy.parameters()]
    step()
    assert type(state.optimizer) is make.func
    assert any(not torch.equal(a, b) for a, b in zip(before, state.policy.parameters(), strict=True))
    Snapshot.of(RunState(state)).write(tmp_path)
    resumed, step_resumed = state_of(module, tiny, make)
    restore(RunState(resumed), tmp_path)
    for name in ("grad_norm", "learning_rate", "reward"):
        first, again = step(), step_resumed()
        assert first[name] == again[name]
    assert same(held(state), held(resumed))


def held(state):
    snapshot = Snapshot.of(RunState(state))
    plain = repr(snapshot.plain).replace("(", "[").replace(")", "]")  # tuples come back as lists
    return {"plain": plain}, {**snapshot.weights, **snapshot.tensors}


def test_its_learning_rate_is_the_peak_of_the_schedule(tiny):
    _, step = state_of(grpo, tiny, partial(torch.optim.SGD, lr=0.4))
    assert [step()["learning_rate"] for _ in range(4)] == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_sgd_moves_the_weights_by_the_clipped_gradient_times_its_rate(tiny):
    state, step = state_of(grpo, tiny, partial(torch.optim.SGD, lr=0.25))
    before = torch.cat([weight.detach().flatten().clone() for weight in state.policy.parameters()])
    norm = step()["grad_norm"]
    moved = torch.cat([weight.detach().flatten() for weight in state.policy.parameters()]) - before
    assert float(moved.norm()) == pytest.approx(0.25 * min(1.0, norm), rel=1e-3)


def test_each_round_has_a_new_optimizer_of_ones_own(tiny):
    state, step = state_of(rs, tiny, partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    first = state.tuning.optimizer
    step()
    assert type(state.tuning.optimizer) is torch.optim.SGD
    assert state.tuning.optimizer is not first
    assert not state.tuning.optimizer.state


def test_an_optimizer_that_is_made_already(tiny):
    model, tokenizer = load_policy(tiny)
    own = torch.optim.SGD(model.parameters(), lr=0.5)
    config = grpo.Config(group_size=2, sampling=SAMPLING)
    create = partial(grpo.State.create, model, config, reference=reference_of(model), prompts=3, seed=0)
    state = create(total_steps=2, optimizer=own)
    engine = Engine(model, tokenizer)
    for _ in range(2):
        grpo.step(state, PROMPTS, generator=engine, scorer=SCORER, config=config)
    assert own.param_groups[0]["lr"] == 0.25  # as the schedule left it
    again = create(total_steps=2, optimizer=own)
    assert again.optimizer.param_groups[0]["peak_lr"] == 0.5


def test_in_bfloat16_it_is_given_the_masters(tiny):
    model, _ = load_policy(tiny, dtype=torch.bfloat16)
    create = partial(sft.State.create, model, 4, sft.Config(), seed=0)
    state = create(optimizer=partial(torch.optim.SGD, lr=1.0))
    (group,) = state.optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(master_of(p)) for p in model.parameters()]
    group["params"][0].grad = torch.ones_like(group["params"][0])
    before = next(model.parameters()).clone()
    state.optimizer.step()
    assert torch.equal(next(model.parameters()), (before.float() - 1.0).bfloat16())
    with pytest.raises(ConfigError, match=r"float32 masters .* functools\.partial"):
        create(optimizer=torch.optim.SGD(model.parameters(), lr=1.0))


def test_an_optimizer_that_does_not_fit_is_refused(tiny):
    model, _ = load_policy(tiny)
    some = torch.optim.SGD(list(model.parameters())[1:], lr=1.0)
    with pytest.raises(ConfigError, match="other parameters than those that are trained"):
        sft.State.create(model, 4, sft.Config(), seed=0, optimizer=some)
    rated = sft.Config(optim=Optim(learning_rate=1e-3))
    with pytest.raises(ConfigError, match="leave learning_rate out of Optim"):
        sft.State.create(model, 4, rated, seed=0, optimizer=partial(torch.optim.SGD, lr=1.0))
    config = ppo.Config(critic_learning_rate=1e-3)
    with pytest.raises(ConfigError, match="leave the critic's out"):
        ppo.State.create(
            model, config, reference=reference_of(model), prompts=1, total_steps=1, seed=0, optimizer=torch.optim.SGD
        )


# -- the reference ---------------------------------------------------------------------------------------------------


def test_a_state_that_is_created_again_keeps_the_reference_it_is_given(tiny):
    """A notebook's cell that is run twice measures the KL from where training began, and not from where it is."""
    model, tokenizer = load_policy(tiny)
    reference = reference_of(model)
    config = grpo.Config(group_size=2, sampling=SAMPLING, optim=Optim(learning_rate=1e-2))

    def cell():
        state = grpo.State.create(model, config, reference=reference, prompts=3, total_steps=1, seed=0)
        return grpo.step(state, PROMPTS, generator=Engine(model, tokenizer), scorer=SCORER, config=config).metrics

    assert abs(cell()["kl"]) < 1e-5
    assert cell()["kl"] > 0.01
    with pytest.raises(TypeError, match="reference"):
        grpo.State.create(model, config, prompts=3, total_steps=1, seed=0)


def test_another_model_can_be_the_reference_and_the_policy_itself_cannot(tiny, tiny_models):
    (model, _), (other, _) = load_policy(tiny), load_policy(tiny)
    create = partial(rs.State.create, model, rs.Config(), prompts=1, seed=0)
    with create(reference=other).reference.model() as frozen:
        assert frozen is other
    assert not any(weight.requires_grad for weight in other.parameters())
    assert all(weight.requires_grad for weight in model.parameters())
    with pytest.raises(ConfigError, match=r"the policy's own weights.* reference_of\(policy\)"):
        create(reference=model)
    with pytest.raises(ConfigError, match="must be a model or a Reference, found 'base'"):
        create(reference="base")
    small = type(other)(type(other.config)(**{**other.config.to_dict(), "vocab_size": 8}))
    with pytest.raises(ConfigError, match="embeddings for 8 ids, and the policy may emit 264"):
        create(reference=small)


# -- a monitor -------------------------------------------------------------------------------------------------------


def test_the_example_of_a_monitor_raises_alarms_and_ends_the_run(capsys):
    example = runpy.run_path(str(EXAMPLES / "own_monitor.py"))
    monitor = example["Shrinking"]()
    found = [
        monitor.watch(step, StepResult(metrics={"completions/mean_length": length}))
        for step, length in enumerate((20.0, 17.0, 15.0, 11.0), 1)
    ]
    assert [[type(one) for one in said] for said in found] == [[], [], [Alarm], [Stop]]
    assert monitor.state.first == 20.0
    example["main"](2)
    assert "ended: after its last step" in capsys.readouterr().out
