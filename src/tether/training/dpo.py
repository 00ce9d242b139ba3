"""``tether dpo``: a policy fitted to preference pairs directly."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tether.algorithms import dpo
from tether.algorithms.pair_evaluation import Evaluation
from tether.config import DataOptions, EvaluationOptions, RewardCalls, RunOptions
from tether.data.checks import keep_from_prompts, leave_out
from tether.data.fingerprint import fingerprint
from tether.data.records import load_pairs, load_prompts
from tether.errors import ConfigError, DataError
from tether.generation.engine import Engine
from tether.models.loading import load_policy
from tether.models.reference import Reference, reference_of
from tether.models.trainable import trainable
from tether.observers import Hook, Monitor
from tether.rewards.checks import prepared
from tether.rewards.combine import WeightedSum
from tether.runtime.metric_names import EVALUATED, PREFERENCES, evaluation_names
from tether.runtime.recorder import Recorder
from tether.runtime.state import RunState
from tether.training.common import (
    NEW,
    Loaded,
    Start,
    finish,
    load,
    located,
    open_run,
    save_policy,
    until_ended,
)
from tether.training.estimate import extent_of, of_pairs
from tether.training.held_out import held_out_of
from tether.training.loading import require_room
from tether.training.policy import early_stopping
from tether.training.preference_splits import Splits, split, tell_small
from tether.training.task import Task, load_rewards
from tether.types import Budget, Metrics, PreferencePair, Prompt, Sampling
from tether.untrusted import one_line

PATIENCE = "-eval/loss"
"""What the patience watches."""
NO_CONTEXT = "has no prompt, and the sides differ at their first token, which nothing predicts"


@dataclass(frozen=True, kw_only=True)
class DPO:
    """Fit a policy to preference pairs directly (DPO)."""

    model: str
    """Policy to start from, which is the reference too: a directory, a hub id or 'base'."""
    pairs: str
    """Rows with chosen and rejected, with or without prompt and margin: a file or a hub id."""
    eval_pairs: str | None = None
    """Held-out pairs, on which the loss and the accuracy are measured; unless given, they are cut from the pairs, all
    pairs of a prompt together."""
    eval_share: float = 0.1
    """Share of the pairs that is cut off to measure on when no eval_pairs are given; 0 is none."""
    data_options: DataOptions = field(default_factory=DataOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    calls: RewardCalls = field(default_factory=RewardCalls)
    sampling: Sampling = field(default_factory=Sampling)
    budget: Budget = field(default_factory=Budget)
    run: RunOptions
    dpo: dpo.Config = field(default_factory=dpo.Config)

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        ConfigError.unless(
            self,
            {
                "eval_share must be 0 or more and less than 1": 0 <= self.eval_share < 1,
                "eval_prompts needs eval_reward: give --eval-reward": not self.evaluation.eval_prompts
                or bool(self.evaluation.eval_reward),
                "stop_kl needs eval_every: give --eval-every N, --eval-prompts and --eval-reward": (
                    self.evaluation.stop_kl is None or bool(self.evaluation.eval_every)
                ),
            },
        )


def train(command: DPO, start: Start = NEW, *, monitors: Sequence[Monitor] = (), hooks: Sequence[Hook] = ()) -> None:
    """Load, train, save, compare with the reference, and sum up."""
    run, config = command.run, command.dpo
    loaded = load(run, start, partial(load_policy, command.model))
    questions = load_questions(command, loaded)
    splits = load_splits(command, loaded, questions.eval_prompts if questions else [])
    state = dpo.State.create(loaded.model, len(splits.training), config, seed=run.seed, optimizer=start.given.optimizer)
    # without questions the reference's log-probs of the pairs are enough
    anchor = Anchor(reference_of(loaded.model), run.seed) if questions else None
    recorder = open_run(
        command,
        start,
        loaded,
        title="dpo",
        state=RunState(state, (early_stopping(run, command.evaluation, window=1, metric=PATIENCE), *monitors)),
        total=state.total_steps,
        hooks=hooks,
        extent=extent_of(loaded.model, run, of_pairs(splits.training), *(questions.extent[1:] if questions else ())),
    )
    answers = None
    if questions and anchor:
        answers = held_out_of(questions, loaded, anchor, command.sampling, recorder)
    if not run.quiet:
        tell_small(splits, wants_test=False, name="held-out")

    def due(step: int) -> Callable[[], Metrics] | None:
        found = answers.due(step, state.total_steps) if answers else None
        if answers and found:
            answers.engine.load_weights(step, trainable(loaded.model).items())
        return found

    with recorder.session(stop_after=run.stop_after_seconds):
        results = dpo.steps(
            state, splits.training, splits.stopping, config=config, world=recorder.world, and_evaluate=due
        )
        for result in until_ended(results, recorder):
            recorder.record(state.step, result, last=state.step == state.total_steps)
        with located("dpo"):
            state.guard.require_sound_end()
        step = recorder.take_best()
        save_policy(loaded, recorder)
        found = judge(state, splits, config)
        if found and recorder.writes and not run.quiet:
            print(one_line(verdict(found)), file=sys.stderr)
        compared = answers.comparison(recorder, step) if answers else {"evaluation": {}}
        finish(recorder, summary(splits, found, loaded, recorder) | compared, quiet=run.quiet)


def load_splits(command: DPO, loaded: Loaded, prompts: Sequence[Prompt]) -> Splits:
    """The pairs to learn from, none of which has one of the held-out ``prompts``, and those held out."""
    load, on_bad_rows = loaded.reader(load_pairs, command.data_options), command.data_options.on_bad_rows

    def read(source: str) -> list[PreferencePair]:
        pairs: list[PreferencePair] = load(source)
        bare = dict.fromkeys((i for i, pair in enumerate(pairs) if not pair.prompt_ids), NO_CONTEXT)
        return leave_out(pairs, bare, "no prompt", report=loaded.report, on_bad_rows=on_bad_rows)

    splits = split(
        keep_from_prompts(read(command.pairs), prompts, report=loaded.report, on_bad_rows=on_bad_rows),
        stopping=read(command.eval_pairs) if command.eval_pairs else None,
        test=None,
        eval_share=command.eval_share,
        test_share=0.0,
        loaded=loaded,
        on_bad_rows=on_bad_rows,
        seed=command.run.seed,
    )
    if not splits.stopping and (command.eval_share or command.eval_pairs):
        raise DataError(
            "all pairs have one prompt, so none can be held out whose prompt is not trained on",
            where=command.pairs,
            hint="give --eval-pairs, or hold out none with --eval-share 0",
        )
    loaded.fingerprints.update(pairs=fingerprint(splits.training), eval_pairs=fingerprint(splits.stopping))
    if splits.stopping:
        loaded.sometimes.update(EVALUATED["dpo"])
    elif command.evaluation.patience and not command.run.keep_best:
        raise ConfigError("patience watches eval/loss, and there are no held-out pairs", hint="give --eval-pairs")
    return splits


@dataclass(frozen=True)
class Anchor:
    """What the policy is compared with on held-out prompts, and the seed of the samples."""

    reference: Reference
    seed: int


def load_questions(command: DPO, loaded: Loaded) -> Task | None:
    """The held-out prompts and the evaluation rewards, where they are given. The first reward is the one that
    eval/reward is."""
    options, name = command.evaluation, command.evaluation.eval_prompts
    if name is None:
        loaded.fingerprints["eval_prompts"] = fingerprint([])
        return None
    require_room(loaded.model, command.sampling)
    limit = command.sampling.max_new_tokens
    prompts: list[Prompt] = loaded.reader(load_prompts, command.data_options)(name, max_new_tokens=limit)
    loaded.fingerprints["eval_prompts"] = fingerprint(prompts)
    rewards = load_rewards("eval_reward", options.eval_reward, command.calls, loaded)
    rewards = prepared(rewards, {name: prompts}, max_new_tokens=limit)
    first, *others = (reward.name for reward, _ in rewards.rewards)
    if taken := [reward for reward in (first, *others) if f"rewards/{reward}" in PREFERENCES]:
        raise ConfigError(
            f"an evaluation reward is named {taken[0]!r}, and eval/rewards/{taken[0]} is a figure of the pairs",
            hint="give it another name: --eval-reward NAME:=REWARD",
        )
    if options.eval_every:
        loaded.sometimes.update(evaluation_names([first], others))
    trained, *judges = rewards.rewards
    return Task(
        prompts=[],
        eval_prompts=prompts,
        evaluation=options,
        score=WeightedSum((trained,)),
        engine=Engine(loaded.model, loaded.tokenizer, budget=command.budget),
        judge=WeightedSum(tuple(judges)) if judges else None,
    )


def judge(state: dpo.State, splits: Splits, config: dpo.Config) -> Evaluation | None:
    """How well the policy tells the sides of the held-out pairs apart; None without such pairs."""
    if not splits.stopping:
        return None
    _, unseen = dpo.referred_of(state, splits.training, splits.stopping)
    return state.guard.fit(lambda budget: dpo.judge(state.policy, unseen, config=config, token_budget=budget))


def summary(splits: Splits, found: Evaluation | None, loaded: Loaded, recorder: Recorder) -> dict[str, Any]:
    """What ``summary.json`` holds of the run. Figures without a prefix are on the held-out pairs."""
    counts = {
        "pairs": len(splits.training),
        "held_out_pairs": len(splits.stopping),
        "dropped_rows": dict(Counter(row["kind"] for row in loaded.report.skipped)),
        "steps": recorder.recorded,
        "last": recorder.row,
    }
    if found is None:
        return counts
    return counts | {
        "held_out_prompts": found.prompts,
        "accuracy": found.accuracy,
        "accuracy_ci95": [found.accuracy_low, found.accuracy_high],
        "log_loss": found.log_loss,
        "margin": found.mean_margin,
        "longer_wins": found.longer_wins,
        "prefers_longer": found.prefers_longer,
    }


def verdict(found: Evaluation) -> str:
    """``held-out pairs: accuracy 65.7% ± 9.8 on 99 pairs (95% Wilson); the longer side wins 58.1%``."""
    of = f" of {found.prompts} prompts" if found.prompts < found.pairs else ""
    return (
        f"held-out pairs: accuracy {found.accuracy:.1%} ± {100 * found.uncertainty:.1f} on {found.pairs} pairs{of} "
        f"(95% Wilson); the longer side is preferred in {found.longer_wins:.1%}"
    )
