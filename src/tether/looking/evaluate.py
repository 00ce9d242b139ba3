"""``tether eval``: measure a policy on prompts, or a reward model on pairs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tether.algorithms import reward_model
from tether.config import DataOptions, DeviceOptions
from tether.data.checks import DataReport
from tether.data.records import load_pairs, load_prompts
from tether.errors import ConfigError
from tether.evaluation import evaluate_policy, policy_kl, require_comparable, sample_and_score
from tether.generation.engine import Engine
from tether.looking.generate import unrounded
from tether.looking.terminal import show
from tether.models.loading import context_length, embedding_rows, load_policy, unembedded
from tether.models.reference import FrozenCopy
from tether.models.reward import load_reward_model
from tether.rewards.checks import prepared
from tether.rewards.resolve import resolve_scorer
from tether.runtime.device import pick_device, pick_dtype
from tether.runtime.json_text import to_json
from tether.seeds import derive_seed
from tether.training.common import EVAL_SEED, require_room, set_matmul_dtype
from tether.training.inputs import naming_the_model_of_a_run
from tether.types import Budget, Sampling


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure a policy on prompts, or a reward model on pairs; the result is one JSON object."""

    model: str | None = None
    """Policy to measure: a directory, a hub id or 'base'."""
    prompts: str | None = None
    """Rows with a prompt, for a policy."""
    reward: tuple[str, ...] = ()
    """Reward of the completions, as in training."""
    reference: str | None = None
    """Model to measure the KL and the win rate against; neither is reported unless given."""
    reward_model: str | None = None
    """Reward model to measure, instead of a policy."""
    pairs: str | None = None
    """Rows with chosen and rejected, for a reward model."""
    group_size: int = 1
    """Completions per prompt."""
    seed: int = 0
    """Seed of every completion."""
    data: DataOptions = field(default_factory=DataOptions)
    device: DeviceOptions = field(default_factory=unrounded)
    sampling: Sampling = field(default_factory=Sampling)
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        policy = (self.model, self.prompts, self.reward, self.reference)
        judge = (self.reward_model, self.pairs)
        ConfigError.unless_typed(self)
        ConfigError.unless(
            self,
            {
                "give --model, --prompts and --reward to measure a policy, or --reward-model and --pairs": (
                    all(policy[:3]) and not any(judge)
                )
                or (all(judge) and not any(policy)),
                "group_size must be at least 1": self.group_size >= 1,
            },
        )


@naming_the_model_of_a_run()
def evaluate(command: Eval) -> None:
    device, dtype = pick_device(command.device.device), pick_dtype(command.device.dtype)
    if command.reward_model is not None and command.pairs is not None:
        found = measured_judge(command, command.reward_model, command.pairs, device=device, dtype=dtype)
    else:
        assert command.model is not None
        assert command.prompts is not None
        found = measured_policy(command, command.model, command.prompts, device=device, dtype=dtype)
    show(to_json(found, indent=2, ascii_only=True))


def measured_judge(
    command: Eval, model: str, source: str, *, device: torch.device, dtype: torch.dtype
) -> dict[str, object]:
    """What ``tether eval`` says of a reward model."""
    report = DataReport()
    judge, tokenizer = load_reward_model(model, dtype=dtype, device=device)
    set_matmul_dtype(command.device.matmul_dtype, judge)
    pairs = load_pairs(
        source,
        tokenizer,
        context=context_length(judge),
        overlong=command.data.overlong,
        on_bad_rows=command.data.on_bad_rows,
        report=report,
        unembedded=unembedded(tokenizer, embedding_rows(judge)),
    )
    report.tell()
    return {"reward_model": model, **vars(reward_model.evaluate(judge, pairs, token_budget=16384))}


def measured_policy(
    command: Eval, name: str, source: str, *, device: torch.device, dtype: torch.dtype
) -> dict[str, object]:
    """What ``tether eval`` says of a policy."""
    report = DataReport()
    model, tokenizer = load_policy(name, dtype=dtype, device=device)
    matmul_dtype = set_matmul_dtype(command.device.matmul_dtype, model)
    score = resolve_scorer(command.reward, tokenizer, dtype=dtype, device=device, rounded=matmul_dtype == "bfloat16")
    require_room(model, command.sampling)
    prompts = load_prompts(
        source,
        tokenizer,
        context=context_length(model),
        max_new_tokens=command.sampling.max_new_tokens,
        overlong=command.data.overlong,
        on_bad_rows=command.data.on_bad_rows,
        report=report,
        unembedded=unembedded(tokenizer, embedding_rows(model)),
    )
    score = prepared(score, {source: prompts}, max_new_tokens=command.sampling.max_new_tokens)
    report.tell()
    reference, own = (
        load_policy(command.reference, dtype=dtype, device=device) if command.reference else (model, tokenizer)
    )
    if own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            "its tokenizer is not the model's, so there is no KL between them", where=f"--reference {command.reference}"
        )
    if command.reference:
        require_comparable(
            model,
            reference,
            prompts,
            max_new_tokens=command.sampling.max_new_tokens,
            where=f"--reference {command.reference}",
        )
    set_matmul_dtype(matmul_dtype, reference)
    groups, against = (
        sample_and_score(
            Engine(one, tokenizer, budget=command.budget),
            score,
            prompts,
            group_size=command.group_size,
            sampling=command.sampling,
            seed=derive_seed(command.seed, EVAL_SEED),
        )
        for one in (model, reference)
    )
    if command.reference is None:
        found = evaluate_policy(groups, against, kl=0.0).as_dict()
        found = {key: value for key, value in found.items() if key not in ("kl", "win_rate")}
    else:
        temperature = command.sampling.temperature or 1.0
        kl = policy_kl(groups, policy=model, reference=FrozenCopy(reference), temperature=temperature)
        found = evaluate_policy(groups, against, kl=kl).as_dict()
    return {"model": name, "reference": command.reference, **found}
