"""TRL's loss and ours, number for number: value and gradient on the same tensors, in its environment and in this one.

``python -m benchmarks.peers setup`` makes it; without it these tests are skipped.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from tether.algorithms.surrogate import Surrogate, surrogate_of
from tether.ops.losses import LossInputs, grpo_loss, grpo_terms
from tether.ops.reduce import reduce_loss
from tether.ops.surrogates import adapt_entropy_coef, entropy_price

PYTHON = Path(__file__).resolve().parents[2] / ".peers" / "trl-1.16" / "bin" / "python"

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="needs the peers' environment: python -m benchmarks.peers setup"
)

LOSS = """
import collections, json, sys, types
import torch
from trl import GRPOTrainer

def losses(case, coef=None):
    same = types.SimpleNamespace
    t = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in case["tensors"].items()}
    logp = t["logp"].requires_grad_()
    args = same(delta=None, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, use_bias_correction_kl=False,
        entropy_target=1.0, entropy_coef_delta=0.01, entropy_coef_min=0.0, entropy_coef_max=1.0)
    for name, value in case.get("args", {}).items():
        setattr(args, name, value)
    accelerator = same(num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x, sync_gradients=True)
    trainer = same(args=args, accelerator=accelerator, model=same(training=True), loss_type=case["loss_type"],
        epsilon_low=0.2, epsilon_high=case.get("epsilon_high", 0.3), beta=0.0, top_entropy_quantile=1.0,
        off_policy_mask_threshold=None, importance_sampling_level=case.get("level", "token"),
        use_vllm="ratio" in t, vllm_importance_sampling_correction=True, aux_loss_enabled=False,
        current_gradient_accumulation_steps=1, max_completion_length=7, use_adaptive_entropy=coef is not None,
        entropy_coef=case.get("entropy_coef", 0.0), _entropy_bonus_enabled=coef is not None or "entropy_coef" in case,
        _last_world_entropy=float("inf"), _entropy_window_stats=None,
        _metrics={"train": collections.defaultdict(list)})
    trainer.args.steps_per_generation = 1
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logp, trainer.entropies, None)
    mask = t["mask"]
    inputs = dict(prompt_ids=torch.zeros(len(mask), 1), prompt_mask=torch.ones(len(mask), 1), completion_ids=mask,
        completion_mask=mask, advantages=t["advantages"], old_per_token_logps=t["old_logp"],
        num_items_in_batch=mask.sum())
    if "ratio" in t:
        inputs["importance_sampling_ratio"] = t["ratio"]
    trainer.entropies = t["entropy"]
    if coef is None:
        loss = GRPOTrainer._compute_loss(trainer, None, inputs)
        (gradient,) = torch.autograd.grad(loss, logp)
        return [loss.item(), gradient.tolist()]
    applied = []
    for entropy in coef:
        trainer.entropies = torch.zeros_like(logp)
        bare = GRPOTrainer._compute_loss(same(**{**vars(trainer), "_entropy_bonus_enabled": False}), None, inputs)
        trainer.entropies = torch.full_like(logp, entropy)
        with_bonus = GRPOTrainer._compute_loss(trainer, None, inputs)
        applied.append([((bare - with_bonus) / entropy).item(), trainer.entropy_coef])
    return applied

print(json.dumps([losses(case, case.get("entropies")) for case in json.loads(sys.argv[1])]))
"""


def theirs(cases):
    line = [str(PYTHON), "-W", "ignore", "-c", LOSS, json.dumps(cases)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


SHAPE = (5, 7)
GENERATOR = torch.Generator().manual_seed(0)


def draw(scale=1.0):
    return scale * torch.randn(SHAPE, generator=GENERATOR, dtype=torch.float64)


MASK = torch.arange(7) < torch.tensor([[7], [3], [5], [1], [6]])
OLD = -1.0 - draw().abs()
LOGP = OLD + draw(0.8)
ADVANTAGES = torch.tensor([1.5, -2.0, 0.0, 0.7, -0.4], dtype=torch.float64)
ENTROPY = draw().abs()
CUT = torch.tensor([False, True, False, False, True])
GAP = draw(0.6)

REDUCTIONS = {"grpo": "sequence_mean", "sapo": "sequence_mean", "dapo": "token_mean", "cispo": "token_mean"}
CASES = {
    "clip": ({"loss_type": "grpo"}, {"clip_high": 0.3}),
    "two-sided": ({"loss_type": "grpo", "args": {"delta": 1.8}}, {"clip_high": 0.3, "clip_dual": 1.8}),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.5}, {"policy_loss": "cispo", "clip_high": 0.5}),
    "sapo": ({"loss_type": "sapo"}, {"policy_loss": "sapo"}),
    "sapo with other temperatures": (
        {"loss_type": "sapo", "args": {"sapo_temperature_pos": 0.5, "sapo_temperature_neg": 3.0}},
        {"policy_loss": "sapo", "sapo_tau_pos": 0.5, "sapo_tau_neg": 3.0},
    ),
    "gspo": ({"loss_type": "grpo", "level": "sequence"}, {"clip_high": 0.3}),
    "masked, mean over completions": ({"loss_type": "grpo"}, {"clip_high": 0.3, "mask_truncated": True}),
    "masked, mean over tokens": ({"loss_type": "dapo"}, {"clip_high": 0.3, "mask_truncated": True}),
    "tis, token": ({"loss_type": "dapo"}, {"clip_high": 0.3, "mismatch": "tis"}),
    "mis, sequence": ({"loss_type": "grpo"}, {"clip_high": 0.3, "mismatch": "mis", "mismatch_level": "sequence"}),
}
ENTROPIES = [1.4, 0.9, 0.8, 0.7, 1.2, 0.6]


def weights_of_trl(options):
    """As its trainer computes the ratio before the loss, in modes token_truncate and sequence_mask."""
    gap = (OLD - (OLD - GAP)) * MASK
    if options["mismatch"] == "tis":
        return gap.exp().clamp(max=2.0)
    whole = gap.sum(1, keepdim=True).exp()
    return whole.masked_fill(whole > 2.0, 0.0)


def given(case, options):
    mask = MASK & ~CUT.unsqueeze(1) if options.get("mask_truncated") else MASK
    tensors = {"logp": LOGP, "old_logp": OLD, "advantages": ADVANTAGES, "mask": mask.double(), "entropy": ENTROPY}
    if "mismatch" in options:
        tensors["ratio"] = weights_of_trl(options)
    return {**case, "tensors": {name: tensor.tolist() for name, tensor in tensors.items()}}


def ours(case, options):
    logp = LOGP.clone().requires_grad_()
    surrogate = Surrogate(**options)
    inputs = LossInputs(
        logp=logp,
        old_logp=OLD,
        sampler_logp=OLD - GAP,
        ref_logp=OLD,
        entropy=ENTROPY,
        advantages=ADVANTAGES.unsqueeze(1).expand(SHAPE),
        mask=MASK & ~(CUT & surrogate.mask_truncated).unsqueeze(1),
    )
    terms = grpo_terms(surrogate_of(inputs, surrogate, ratio_level=case.get("level", "token")), inputs.advantages)
    whole = grpo_loss(terms, inputs, kl_weight=0.0, kl_estimator="k2", kl_level="token")
    loss = reduce_loss(
        whole.loss,
        inputs.mask,
        reduction=REDUCTIONS[case["loss_type"]],
        sequences=len(MASK),
        tokens=int(inputs.mask.sum()),
        max_length=7,
    )
    (gradient,) = torch.autograd.grad(loss, logp)
    return loss.item(), gradient


@pytest.fixture(scope="module")
def found():
    cases = [given(case, options) for case, options in CASES.values()]
    cases.append({**given({"loss_type": "dapo"}, {}), "entropies": ENTROPIES})
    return dict(zip([*CASES, "entropy"], theirs(cases), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_trls(found, name):
    case, options = CASES[name]
    loss, gradient = ours(case, options)
    assert loss == pytest.approx(found[name][0], rel=1e-9)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient, torch.tensor(found[name][1], dtype=torch.float64))


def test_the_adaptive_entropy_coefficient_is_trls(found):
    coef, last = 0.0, None
    for entropy, (applied, after) in zip(ENTROPIES, found["entropy"], strict=True):
        assert entropy_price(coef, last, target=1.0) == pytest.approx(applied, abs=1e-9)
        coef, last = adapt_entropy_coef(coef, entropy, target=1.0, step=0.01), entropy
        assert coef == pytest.approx(after)
    assert max(applied for applied, _ in found["entropy"]) > 0
