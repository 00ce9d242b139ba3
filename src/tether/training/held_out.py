"""The held-out prompts of a run: how the policy does on them, beside its reference, while it is trained and at the end.

Policy and reference answer the same prompts with the same seeds, at every evaluation alike, so that its figures differ
by the weights alone. Nothing that trains depends on an evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from tether.config import EvaluationOptions
from tether.errors import RewardError
from tether.evaluation import PolicyEvaluation, completion_kl, evaluate_policy, write_evaluation
from tether.generation.engine import Engine
from tether.models.reference import Reference
from tether.runtime.changes import placeless
from tether.runtime.journal import Journal
from tether.runtime.metric_names import EVALUATION, OF_JUDGES
from tether.runtime.recorder import Recorder
from tether.seeds import derive_seed
from tether.training.common import EVAL_SEED, Loaded, located
from tether.training.task import Task
from tether.types import Metrics, Prompt, RolloutGroup, Sampling, Score, ScoredGroup, Scorer, make_requests


@dataclass(frozen=True)
class Judged:
    """A :class:`tether.types.Scorer` whose totals are those of ``trained``, with the parts of ``judge`` beside."""

    trained: Scorer
    judge: Scorer | None

    def score(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        scored = self.trained.score(groups)
        if self.judge is None:
            return scored
        return [with_parts(one, other) for one, other in zip(scored, self.judge.score(groups), strict=True)]


def with_parts(group: ScoredGroup, other: ScoredGroup) -> ScoredGroup:
    """``group`` with the parts of ``other``, which has the same completions, beside its own."""
    pairs = zip(group.scores, other.scores, strict=True)
    return replace(group, scores=tuple(replace(one, parts={**one.parts, **two.parts}) for one, two in pairs))


def by_part(groups: Sequence[ScoredGroup], name: str) -> list[ScoredGroup]:
    """The groups with the part ``name`` as their score."""

    def chosen(score: Score) -> Score:
        return replace(score, total=score.parts.get(name), token_rewards=None)

    return [replace(group, scores=tuple(map(chosen, group.scores))) for group in groups]


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What the policy did on the held-out prompts."""

    groups: list[ScoredGroup]
    kl: Tensor  # [B], nats, of each completion of the groups
    found: PolicyEvaluation
    """By the reward that it is trained on."""
    judged: Mapping[str, PolicyEvaluation]
    """By each evaluation reward."""

    def metrics(self) -> Metrics:
        """The figures as metrics of a row, ``eval/...``."""
        figures = {name: float(getattr(self.found, name)) for name in EVALUATION}
        figures |= {f"rewards/{name}": value for name, value in self.found.rewards.items()}
        for name, found in self.judged.items():
            figures |= {f"{key}/{name}": float(getattr(found, figure)) for key, figure in OF_JUDGES.items()}
        return {f"eval/{name}": value for name, value in figures.items()}


@dataclass(kw_only=True)
class HeldOut:
    """The held-out prompts of a run, and what was found on them."""

    policy: PreTrainedModel
    reference: Reference
    engine: Engine
    """The policy's, of the run."""
    prompts: Sequence[Prompt]
    score: Scorer
    judges: tuple[str, ...]
    """Names of the evaluation rewards."""
    sampling: Sampling
    options: EvaluationOptions
    seed: int
    """All completions have theirs from it."""
    journal: Journal | None
    """Keeps scores, so that what is repeated after a kill is not scored again; None among several ranks."""
    against: list[ScoredGroup] = field(default_factory=list)
    """What the reference did, once it is known; it never changes."""
    latest: tuple[int, Evaluated] | None = None
    """The last evaluation, and the step after which it was made."""

    def due(self, step: int, total: int) -> Callable[[], Metrics] | None:
        """The evaluation that is due at the end of ``step``, as its metrics; None where none is."""
        every = self.options.eval_every
        if not self.prompts or not every or (step % every and step != total):
            return None
        return partial(self.metrics_after, step)

    def metrics_after(self, step: int) -> Metrics:
        """Evaluate the policy as it is, after ``step``."""
        return self.evaluated(step).metrics()

    def evaluated(self, step: int) -> Evaluated:
        """The evaluation after ``step``: the latest one if it was made there, else of the policy as it is."""
        if self.latest is None or self.latest[0] != step:
            self.latest = None  # two need not fit into memory
            with located("evaluation"):
                self.latest = step, self._evaluate()
        return self.latest[1]

    def _evaluate(self) -> Evaluated:
        if not self.against:
            with self.reference.model() as frozen:
                own = self.engine
                engine = Engine(frozen, own.tokenizer, budget=own.budget, episodes=own.episodes)
                self.against = self._scored(self._sampled(engine), once=True)
        groups = self._scored(self._sampled(self.engine))
        temperature = self.sampling.temperature or 1.0
        kl = completion_kl(groups, policy=self.policy, reference=self.reference, temperature=temperature)
        return self.assessed(groups, kl)

    def _scored(self, groups: Sequence[RolloutGroup], *, once: bool = False) -> list[ScoredGroup]:
        """The scores of the reference, ``once`` per run, or of the policy in this step."""
        if self.journal is None:
            return self.score.score(groups)
        by = repr([placeless(one) for one in self.options.eval_reward])
        if once:
            return self.journal.scored_once("reference.scores", self.score, groups, by=by)
        self.journal.calls += 1
        return self.journal.scored(self.score, groups, by=by)

    def _sampled(self, engine: Engine) -> list[RolloutGroup]:
        asked = make_requests(self.prompts, group_size=self.options.eval_group_size, seed=self.seed)
        return engine.generate(asked, sampling=self.sampling)

    def assessed(self, groups: list[ScoredGroup], kl: Tensor) -> Evaluated:
        """The figures of the policy's ``groups`` beside those of the reference."""
        mean = float(kl.mean())
        judged = {}
        for name in self.judges:
            try:
                judged[name] = evaluate_policy(by_part(groups, name), by_part(self.against, name), kl=mean)
            except RewardError as error:
                error.at(f"reward {name!r}")
                raise
        return Evaluated(groups=groups, kl=kl, found=evaluate_policy(groups, self.against, kl=mean), judged=judged)

    def comparison(self, recorder: Recorder, step: int) -> dict[str, Any]:
        """Policy and reference after training, as ``summary.json`` has them, and ``evaluation.parquet``; without
        held-out prompts neither. ``step`` is the one whose policy it is."""
        if not self.prompts:
            return {"evaluation": {}}
        policy = self.evaluated(step)
        reference = self.assessed(self.against, policy.kl * 0)
        if recorder.writes:
            write_evaluation(recorder.directory.path, policy.groups, self.against, policy.kl, seed=self.seed)
        both = {"reference": reference, "policy": policy}
        judged = {judge: {model: summed_up(one.judged[judge]) for model, one in both.items()} for judge in self.judges}
        return {
            "evaluation": {model: one.found.as_dict() for model, one in both.items()},
            **({"eval_rewards": judged} if judged else {}),
        }


def summed_up(found: PolicyEvaluation) -> dict[str, float]:
    """What depends on the reward, of an evaluation."""
    return {"reward": found.reward, "reward_ci95": found.reward_ci95, "win_rate": found.win_rate}


class Tethered(Protocol):
    """What is read of an algorithm's state: what its policy is compared with, and the seed of the run."""

    @property
    def reference(self) -> Reference: ...

    @property
    def seed(self) -> int: ...


def held_out_of(task: Task, loaded: Loaded, state: Tethered, sampling: Sampling, recorder: Recorder) -> HeldOut:
    """The held-out prompts of a run."""
    return HeldOut(
        policy=loaded.model,
        reference=state.reference,
        engine=task.engine,
        prompts=task.eval_prompts,
        score=Judged(task.score, task.judge),
        judges=tuple(reward.name for reward, _ in task.judge.rewards) if task.judge else (),
        sampling=sampling,
        options=task.evaluation,
        seed=derive_seed(state.seed, EVAL_SEED),
        journal=recorder.own_journal,
    )
