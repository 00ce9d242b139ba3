"""What a policy is to do and what that is worth: the prompts and the rewards of a policy-training command."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tether.config import EvaluationOptions, PromptOptions, RewardCalls
from tether.data.checks import keep_apart
from tether.data.fingerprint import fingerprint
from tether.data.records import load_prompts
from tether.errors import ConfigError, TetherError
from tether.flags import as_flag
from tether.generation.engine import Engine
from tether.models.fingerprint import weights_fingerprint
from tether.monitor.usual import usual_monitors
from tether.observers import Monitor
from tether.rewards.checks import prepared
from tether.rewards.combine import WeightedSum, require_distinct
from tether.rewards.judge import JudgeReward
from tether.rewards.learned import LearnedReward
from tether.rewards.replies import remove_unfinished
from tether.rewards.resolve import resolve_scorer
from tether.runtime.journal import Journal, JournaledGenerator, JournaledScorer
from tether.runtime.metric_names import evaluation_names, reward_names
from tether.runtime.recorder import Recorder
from tether.training.common import Loaded, keep_the_date
from tether.training.estimate import of_prompts
from tether.training.inputs import absolute_rewards, naming_the_model_of_a_run
from tether.training.loading import episodes_of, require_room, tell_unpacked, with_episodes
from tether.training.workload import Row
from tether.types import Generator, Prompt, Sampling, Scorer

REPLIES = "judge_replies"
"""Of the run directory."""


@dataclass(frozen=True)
class Task:
    """What a policy is to do, and what that is worth."""

    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    evaluation: EvaluationOptions
    score: WeightedSum
    engine: Engine
    judge: WeightedSum | None = None
    """The rewards that are reported on the held-out prompts and not trained on."""
    on_alarm: Sequence[str] = ()

    def monitors(self, *, compares: bool = False) -> tuple[Monitor, ...]:
        """What watches the run (:func:`tether.monitor.usual.usual_monitors`). A reward of weight 0 is a judge."""
        judges = [reward.name for reward, weight in self.score.rewards if weight == 0]
        return usual_monitors(self.on_alarm, judges, compares=compares)

    @property
    def extent(self) -> tuple[Sequence[Row], Sequence[Row], WeightedSum, WeightedSum | None]:
        """What :func:`tether.training.estimate.extent_of` is told of it."""
        return of_prompts(self.prompts), of_prompts(self.eval_prompts), self.score, self.judge


def load_task(options: PromptOptions, loaded: Loaded, sampling: Sampling) -> Task:
    """Prompts and rewards of a policy-training command."""
    require_room(loaded.model, sampling)
    training, held_out = load_both(options, loaded, sampling)
    rewards = load_rewards("reward", options.reward, options.calls, loaded) if options.reward else None
    episodes = episodes_of(options.environment, directory=loaded.base, objects=loaded.given.environments)
    score = with_episodes(rewards, episodes, weight=options.environment.env_weight)
    unseen = {options.evaluation.eval_prompts: held_out} if options.evaluation.eval_prompts else {}
    score = prepared(score, {options.prompts: training} | unseen, max_new_tokens=sampling.max_new_tokens)
    judge = None
    if options.evaluation.eval_reward:
        judge = load_rewards("eval_reward", options.evaluation.eval_reward, options.calls, loaded)
        require_distinct([reward.name for reward, _ in (*score.rewards, *judge.rewards)])
        judge = prepared(judge, unseen, max_new_tokens=sampling.max_new_tokens)
    trained, judges = ([reward.name for reward, _ in one.rewards] if one else [] for one in (score, judge))
    loaded.sometimes.update(reward_names(trained))
    if options.evaluation.eval_every:
        loaded.sometimes.update(evaluation_names(trained, judges))
    finished = None
    if options.overlap_scoring:
        score = score.asking_ahead()
        finished = score.begin
    engine = Engine(loaded.model, loaded.tokenizer, budget=options.budget, episodes=episodes, finished=finished)
    return Task(training, held_out, options.evaluation, score, engine, judge, options.on_alarm)


def load_both(options: PromptOptions, loaded: Loaded, sampling: Sampling) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on and those held out."""
    read, unseen = loaded.reader(load_prompts, options.data), options.evaluation.eval_prompts
    training = read(options.prompts, max_new_tokens=sampling.max_new_tokens)
    held_out = read(unseen, max_new_tokens=sampling.max_new_tokens) if unseen is not None else []
    training = keep_apart(training, held_out, report=loaded.report, on_bad_rows=options.data.on_bad_rows)
    loaded.fingerprints.update(prompts=fingerprint(training), eval_prompts=fingerprint(held_out))
    return training, held_out


def load_rewards(option: str, values: Sequence[str], calls: RewardCalls, loaded: Loaded) -> WeightedSum:
    """The rewards of ``option``, ``reward`` or ``eval_reward``, and the fingerprints of those that are models."""
    model = loaded.model
    with naming_the_model_of_a_run(), naming_the_option(option):
        score = resolve_scorer(
            absolute_rewards(values, loaded.base),
            loaded.tokenizer,
            dtype=model.dtype,
            device=model.device,
            rounded=loaded.matmul_dtype == "bfloat16",
            **calls.supervision,
            objects=loaded.given.rewards,
        )
    for reward, weight in score.rewards:
        if option == "eval_reward" and weight != 1.0:
            raise ConfigError(f"the evaluation reward {reward.name!r} has the weight {weight:g}", hint=UNWEIGHTED)
        if isinstance(reward, JudgeReward):
            loaded.fingerprints[f"{option} {reward.name}"] = reward.file.fingerprint()
        if isinstance(reward, LearnedReward):
            loaded.fingerprints[f"{option} {reward.name}"] = weights_fingerprint(reward.model)
            if not loaded.report.quiet:
                tell_unpacked(reward.model)
            keep_the_date(loaded, reward.tokenizer)
    return score


UNWEIGHTED = "each is reported on its own, so leave the weight out"


@contextlib.contextmanager
def naming_the_option(option: str) -> Iterator[None]:
    """Errors about a value of ``--reward`` name the option that it was given by."""
    try:
        yield
    except TetherError as error:
        if error.where.startswith("--reward "):
            error.where = f"{as_flag(option)} {error.where.removeprefix('--reward ')}"
        raise


def journaled(task: Task, recorder: Recorder) -> tuple[Generator, Scorer]:
    """The generator and the scorer of a run's steps; a step that is repeated after a kill gets what it had, unless
    several ranks share it."""
    journal = recorder.own_journal
    if journal is None:
        return task.engine, task.score
    keep_replies([task.score, *([] if task.judge is None else [task.judge])], recorder.directory.path, journal)
    return JournaledGenerator(task.engine, journal), JournaledScorer(task.score, journal)


def keep_replies(scorers: Sequence[WeightedSum], run: Path, journal: Journal) -> None:
    """Keep what judges reply in the directory of the run, unless their files name another one: a resumed run does not
    pay twice."""
    for reward, _ in (one for scorer in scorers for one in scorer.rewards):
        if isinstance(reward, JudgeReward) and reward.replies.directory is None:
            reward.replies.directory, reward.replies.keep = run / REPLIES, journal.keep_for_run
            remove_unfinished(run / REPLIES)
