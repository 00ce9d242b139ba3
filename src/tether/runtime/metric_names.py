"""The names of the metrics that the rows of a command may have, so that a mistyped one is refused before a run begins.

A test compares them with the rows of short runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

from tether.errors import ConfigError
from tether.names import closest, did_you_mean, metric_and_sign

EVERY_ROW = frozenset({"step", "step_time", "tokens_per_second", "mfu", "mfu/step", "memory/peak_gib", "num_tokens"})
UPDATES = frozenset(
    {"loss", "grad_norm", "skipped_updates", "learning_rate", "time/update", "time/eval", "flops/update"}
)
SAMPLED = frozenset(
    {
        "reward", "reward_std", "frac_reward_none", "frac_reward_zero_std", "kl", "kl_per_token",
        "completions/mean_length", "completions/min_length", "completions/max_length",
        "completions/mean_terminated_length", "completions/clipped_ratio",
        "sampling/prefill_tokens_per_second", "sampling/decode_tokens_per_second", "sampling/slot_occupancy",
        "sampling/cache_gib", "time/generate", "time/score", "time/reference", "time/update", "time/eval",
        "flops/generate", "flops/reference", "flops/update",
    }
)  # fmt: skip
POLICY_UPDATES = frozenset(
    {"entropy", "policy/approxkl", "sampling/logprob_gap_mean", "sampling/logprob_gap_max", "time/advantage"}
)
PREFERENCES = frozenset(
    {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"}
)
"""What DPO says of pairs, as TRL names it."""
EVALUATED: Mapping[str, tuple[str, ...]] = {
    "sft": ("eval/loss",),
    "reward": ("eval/accuracy", "eval/loss", "eval/calibration_error", "eval/margin"),
    "dpo": ("eval/loss", *(f"eval/{name}" for name in sorted(PREFERENCES))),
}
"""Those of the rows with an evaluation, by command; those of a policy are in :func:`evaluation_names`."""
BY_COMMAND: Mapping[str, Set[str]] = {
    "sft": EVERY_ROW | UPDATES,
    "reward": EVERY_ROW
    | UPDATES
    | {"accuracy", "margin", "mean_reward"},
    "dpo": EVERY_ROW | UPDATES | PREFERENCES,
    "rejection-sampling": EVERY_ROW
    | SAMPLED
    | {
        "reward/selected", "reward/gain", "selected", "kl/selection_bound", "kl/after", "sft/loss", "sft/final_loss",
        "sft/grad_norm", "sft/skipped_updates", "sft/learning_rate", "sft/num_tokens",
    },
    "ppo": EVERY_ROW
    | UPDATES
    | SAMPLED
    | POLICY_UPDATES
    | {
        "kl_coef", "objective/non_score_reward", "loss/policy", "loss/value", "policy/clipfrac", "val/ratio",
        "val/mean", "val/return_mean", "val/explained_variance", "val/clipfrac", "optimizer_steps",
    },
    "grpo": EVERY_ROW
    | UPDATES
    | SAMPLED
    | POLICY_UPDATES
    | {
        "loss/kl", "kl_coef/effective", "entropy_coef", "advantage_std", "clip_ratio/low_mean", "clip_ratio/high_mean",
        "clip_ratio/region_mean", "sampling/groups_drawn", "sampling/frac_zero_std_drawn",
    },
}  # fmt: skip
"""By command; those of its rewards and of its evaluations come in addition."""


EVALUATION = ("reward", "reward_ci95", "win_rate", "kl", "mean_length")
"""Figures of a policy's evaluation that are metrics, as ``eval/NAME``; the parts of the reward are
``eval/rewards/NAME``."""
OF_JUDGES: Mapping[str, str] = {"rewards_ci95": "reward_ci95", "win_rates": "win_rate"}
"""Of each evaluation reward, as ``eval/KEY/NAME``, and the figure that it is."""


def reward_names(rewards: Iterable[str]) -> set[str]:
    """The metrics of a step's rewards with these names."""
    return {f"rewards/{name}/{figure}" for name in rewards for figure in ("mean", "std")}


def evaluation_names(rewards: Iterable[str], judges: Iterable[str]) -> set[str]:
    """The metrics of a policy's evaluation by these rewards, and by these that it is not trained on."""
    judged = list(judges)
    names = [*EVALUATION, *(f"rewards/{name}" for name in [*rewards, *judged])]
    names += [f"{figure}/{name}" for name in judged for figure in OF_JUDGES]
    return {f"eval/{name}" for name in names}


def require_known(best: str | None, command: str, own: Set[str]) -> None:
    """Raise :class:`ConfigError` before a run begins where ``best``, the value of ``keep_best``, cannot be a metric of
    it. ``own`` holds those that depend on its options. Of a command that is not in :data:`BY_COMMAND` nothing is known.
    """
    metric, _ = metric_and_sign(best or "")
    if command not in BY_COMMAND or any(metric.startswith(f"{name.removesuffix('/mean')}/") for name in own):
        return  # perhaps a member of a reward, which is known when it has scored
    require_metric(best, BY_COMMAND[command] | own)


def require_metric(best: str | None, known: Set[str]) -> None:
    """Raise :class:`ConfigError` unless ``best``, the value of ``keep_best``, names one of the ``known`` metrics."""
    metric, _ = metric_and_sign(best or "")
    if best is None or metric in known:
        return
    names = sorted(known)
    close = did_you_mean(closest(metric, names) or closest(metric.rpartition("/")[2], names))
    raise ConfigError(
        f"the run has no metric {metric!r}",
        where="--keep-best",
        hint=f"{close} metrics.jsonl and docs/metrics.md name them".lstrip(),
    )
