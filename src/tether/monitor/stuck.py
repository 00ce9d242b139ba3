"""Why a run does not learn: one alarm that names the most likely cause.

A run stands still where the rewards of its first :data:`PATIENCE` steps have no trend: the slope of their least-squares
line is below :data:`TREND` standard errors. That is looked at once. Then the causes are gone through in the order of
:data:`CAUSES`, and the first one whose figures fit is named. Where none fits, nothing is said: a reward that is noisy,
or a task that is learned slowly, looks like that too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, linear_regression, pstdev, variance

from tether.monitor.flat_rewards import all_flat, compared
from tether.monitor.trace import examples, read
from tether.observers import Alarm
from tether.types import Metrics, StepResult

PATIENCE, TREND = 20, 1.5
WATCHED = (
    "reward",
    "reward_std",
    "completions/clipped_ratio",
    "kl",
    "kl_coef/effective",
    "kl_coef",
    "entropy",
    "grad_norm",
    "learning_rate",
    "sampling/logprob_gap_mean",
    "val/explained_variance",
)
"""Metrics whose means over the steps the causes are judged by."""
FLAT, SPREAD, WIDEST = "flat", "spread between prompts", "widest"
"""Share of the groups whose rewards are equal, the standard deviation of the groups' means, and the largest difference
within a group as a share of the largest reward."""


@dataclass(kw_only=True)
class State:
    """All that a resumed run needs."""

    steps: int = 0
    figures: dict[str, list[float]] = field(default_factory=dict)
    """Each figure of the first steps."""


@dataclass(kw_only=True)
class NotLearning:
    """Raises one alarm, after :data:`PATIENCE` steps, or none."""

    stop: bool = False
    name: str = "not_learning"
    state: State = field(default_factory=State)

    def watch(self, step: int, result: StepResult) -> Sequence[Alarm]:
        state = self.state
        if state.steps >= PATIENCE or "reward" not in result.metrics:
            return ()
        state.steps += 1
        for name, value in (figures_of(result) | group_figures(result)).items():
            state.figures.setdefault(name, []).append(value)
        if state.steps < PATIENCE:
            return ()
        means = {name: fmean(values) for name, values in state.figures.items()}
        still = not rises(state.figures["reward"])
        for cause in CAUSES:
            if (still or cause in WHATEVER_THE_TREND) and (found := cause(means)) is not None:
                message, advice = found
                return [
                    Alarm(
                        monitor=self.name,
                        message=f"after {PATIENCE} steps with a mean reward of {means['reward']:.3g}"
                        f"{', without a trend' * still}: {message}",
                        since=step - PATIENCE + 1,
                        examples=examples(read(result)),
                        advice=advice,
                        stop=self.stop,
                    )
                ]
        return ()


def figures_of(result: StepResult) -> Metrics:
    return {name: result.metrics[name] for name in WATCHED if name in result.metrics}


def group_figures(result: StepResult) -> Metrics:
    """:data:`FLAT`, :data:`SPREAD` and :data:`WIDEST`, of the groups of two and more; nothing where there is none."""
    groups = compared(result)
    if not groups:
        return {}
    largest = max(abs(total) for group in groups for total in group) or 1.0
    return {
        WIDEST: max(max(group) - min(group) for group in groups) / largest,
        FLAT: fmean(float(all_flat([group])) for group in groups),
        SPREAD: pstdev(map(fmean, groups)),
    }


def rises(rewards: Sequence[float]) -> bool:
    """Whether the rewards have a trend: the slope of their least-squares line is above :data:`TREND` standard "
    "errors."""
    steps = range(len(rewards))
    slope, begin = linear_regression(steps, rewards)
    left = sum((reward - begin - slope * i) ** 2 for i, reward in zip(steps, rewards, strict=True))
    error = math.sqrt(left / (len(rewards) - 2) / (variance(steps) * (len(rewards) - 1)))
    return slope > TREND * error + 1e-12 * abs(fmean(rewards))


Found = tuple[str, str] | None
"""What is wrong, and what to change first."""


def equal_rewards(means: Mapping[str, float]) -> Found:
    """No group, or hardly any, has rewards that differ."""
    if means.get(FLAT, 0.0) < 0.9:
        return None
    share = f"in {means[FLAT]:.0%} of the groups all completions have equal rewards"
    if means[WIDEST] > 1e-6:
        return (
            f"in {means[FLAT]:.0%} of the groups the rewards are so close that they count as equal, though they "
            "differ by "
            f"{means[WIDEST]:.0%} of the largest one: their scale is too small",
            "give the reward a weight that makes it about 1 (--reward SPEC=WEIGHT), or subtract what all rewards share",
        )
    if means[SPREAD] > 1e-9 * max(1.0, abs(means["reward"])):
        return (
            f"{share}, and the groups differ: the reward depends on the prompt and not on the completion",
            "check what the reward function reads: completions, not prompts",
        )
    return (
        f"{share}, and so do different prompts: no completion earns more than another, because the task is never "
        "solved, or "
        "always, or the format that the reward asks for is never met",
        "read the samples (tether show); fine-tune on a few examples of the format (tether sft), choose prompts of "
        "another "
        "difficulty, or give a reward for part of the way",
    )


def cut_short(means: Mapping[str, float]) -> Found:
    """Hardly any completion ends by itself, and most groups have equal rewards: what is asked for comes too late."""
    if means.get("completions/clipped_ratio", 0.0) < 0.9 or means.get(FLAT, 0.0) < 0.5:
        return None
    return (
        f"{means['completions/clipped_ratio']:.0%} of the completions are cut at the length limit, and in "
        f"{means[FLAT]:.0%} of the groups all rewards are equal",
        "raise --max-new-tokens; if they still do not end, the model does not emit its stop token: check "
        "--chat-template "
        "and the tokenizer's EOS, or give --stop",
    )


def other_sampler(means: Mapping[str, float]) -> Found:
    """The sampler draws from another distribution than the trainer thinks."""
    if means.get("sampling/logprob_gap_mean", 0.0) < 0.1:
        return None
    return (
        f"the log-probs of sampler and trainer differ by {means['sampling/logprob_gap_mean']:.2g} nats per token",
        "use one precision for both (--dtype, --matmul-dtype), or correct for it (--mismatch tis)",
    )


def no_entropy(means: Mapping[str, float]) -> Found:
    """The policy has nothing to explore."""
    if means.get("entropy", 1.0) > 0.02:
        return None
    return (
        f"the policy's entropy is {means['entropy']:.2g} nats per token, so its completions hardly differ",
        "raise --temperature, or start from a model that was fine-tuned for less long",
    )


def no_movement(means: Mapping[str, float]) -> Found:
    """The policy is where it was."""
    if "kl" not in means or abs(means["kl"]) > 0.02:
        return None
    rate, norm = means.get("learning_rate", 0.0), means.get("grad_norm", 0.0)
    moved = f"the policy has hardly moved (KL {means['kl']:.2g} nats per completion)"
    coef = means.get("kl_coef/effective", means.get("kl_coef", 0.0))
    if coef > 10 * max(means.get("reward_std", 0.0), 1e-12):
        return f"{moved}, held by a kl_coef of {coef:.3g} beside rewards that spread by {means['reward_std']:.2g}", (
            "lower --kl-coef"
        )
    if norm < 1e-6:
        return f"{moved}: the gradient is {norm:.2g}", "check the scale of the reward"
    return f"{moved} at a learning rate of {rate:.2g} (gradient norm {norm:.2g})", "raise --learning-rate tenfold"


def strong_kl(means: Mapping[str, float]) -> Found:
    """The penalty outweighs what there is to gain."""
    coef, spread = means.get("kl_coef/effective", means.get("kl_coef", 0.0)), means.get("reward_std", 0.0)
    if "kl" not in means or coef * means["kl"] < spread or not spread:
        return None
    return (
        f"the KL penalty ({coef:.3g} x {means['kl']:.2g} nats) is as large as the spread of the rewards ({spread:.2g})",
        "lower --kl-coef",
    )


def no_critic(means: Mapping[str, float]) -> Found:
    """The critic explains nothing."""
    if means.get("val/explained_variance", 1.0) > 0.0:
        return None
    return (
        f"the critic explains {means['val/explained_variance']:.2g} of the variance of the returns, none of it",
        "raise --value-coef or the critic's learning rate, scale the reward to about 1, or use grpo",
    )


WHATEVER_THE_TREND = (no_entropy, no_movement)
"""A policy that has not moved has learned nothing, whatever the rewards of its samples do."""
CAUSES: Sequence[Callable[[Mapping[str, float]], Found]] = (
    cut_short,
    equal_rewards,
    other_sampler,
    no_entropy,
    no_movement,
    strong_kl,
    no_critic,
)
