"""``tether reward``: reward-model training."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tether.algorithms import reward_model
from tether.algorithms.pair_evaluation import Evaluation, evaluation_of, prompts_of
from tether.config import DataOptions, RunOptions
from tether.data.fingerprint import fingerprint
from tether.data.records import load_pairs
from tether.data.tokenise import eos_id, special_front
from tether.errors import ConfigError, DataError
from tether.models.reward import new_reward_model, save_reward_model
from tether.observers import Hook, Monitor
from tether.runtime.judged_pairs import JudgedPair, write_judged
from tether.runtime.metric_names import EVALUATED
from tether.runtime.state import RunState
from tether.training.common import NEW, Loaded, Start, finish, load, open_run, save, until_ended
from tether.training.estimate import extent_of, of_pairs
from tether.training.preference_splits import Splits, split, tell_small
from tether.types import PreferencePair
from tether.untrusted import one_line


@dataclass(frozen=True, kw_only=True)
class Reward:
    """Train a reward model on preference pairs."""

    model: str
    """Language model to start from: a directory, a hub id or 'base'."""
    pairs: str
    """Rows with chosen and rejected, with or without prompt and margin: a file or a hub id."""
    eval_pairs: str | None = None
    """Stopping pairs, which decide when training stops and which weights are kept; unless given, they are cut from the
    pairs, all pairs of a prompt together."""
    test_pairs: str | None = None
    """Test pairs, which the model that is kept is judged by, and nothing else depends on; unless given, they are cut
    from the pairs too."""
    eval_share: float = 0.1
    """Share of the pairs that is cut off to stop by when no eval_pairs are given."""
    test_share: float = 0.1
    """Share of the pairs that is cut off to judge by when no test_pairs are given; 0 is none."""
    data_options: DataOptions = field(default_factory=DataOptions)
    run: RunOptions
    reward: reward_model.Config = field(default_factory=reward_model.Config)

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)
        ConfigError.unless(
            self,
            {
                "eval_share must lie between 0 and 1": 0 < self.eval_share < 1,
                "test_share must be 0 or more and less than 1": 0 <= self.test_share < 1,
            },
        )


def train(command: Reward, start: Start = NEW, *, monitors: Sequence[Monitor] = (), hooks: Sequence[Hook] = ()) -> None:
    """Load, train, save the best weights, judge them, and sum up."""
    run, config = command.run, command.reward
    loaded = load(run, start, partial(new_reward_model, command.model, seed=run.seed))
    splits = load_splits(command, loaded)
    loaded.fingerprints.update(
        pairs=fingerprint(splits.training),
        eval_pairs=fingerprint(splits.stopping),
        test_pairs=fingerprint(splits.test),
    )
    loaded.sometimes.update(EVALUATED["reward"])
    state = reward_model.State.create(
        loaded.model, len(splits.training), config, seed=run.seed, optimizer=start.given.optimizer
    )
    recorder = open_run(
        command,
        start,
        loaded,
        title="reward",
        state=RunState(state, tuple(monitors)),
        total=state.total_steps,
        hooks=hooks,
        extent=extent_of(loaded.model, run, of_pairs(splits.training)),
    )
    if not run.quiet:
        tell_small(splits, wants_test=command.test_share > 0 or command.test_pairs is not None)
    with recorder.session(stop_after=run.stop_after_seconds):
        results = reward_model.steps(state, splits.training, splits.stopping, config=config, world=recorder.world)
        for result in until_ended(results, recorder):
            recorder.record(state.step, result, last=state.over(config))
        if recorder.ended and "eval/accuracy" not in recorder.row:  # it ended between two evaluations
            reward_model.measure(state, splits.stopping, world=recorder.world)
        step = recorder.take_best()
        if recorder.best:  # --keep-best chooses, in place of the evaluations
            reward_model.choose(state, splits.stopping, step=step)
        reward_model.restore_best(state, splits.training)
        scores = state.guard.fit(
            lambda budget: reward_model.score_pairs(loaded.model, splits.judged, token_budget=budget)
        )
        evaluation = evaluation_of(splits.judged, scores)
        probes = reward_model.sides(splits.stopping[:8])
        save(recorder, lambda path: save_reward_model(loaded.model, loaded.tokenizer, path, probes))
        if splits.test and recorder.writes:
            write_judged(recorder.directory.path, judged_pairs(splits.test, scores, loaded.tokenizer))
        stopped = recorder.ended or state.why_over(config)
        if recorder.writes and not run.quiet:
            print(one_line(verdict(evaluation, state, stopped, chosen_by=not splits.test)), file=sys.stderr)
        finish(recorder, summary(splits, state, evaluation, loaded, stopped), quiet=run.quiet)


def load_splits(command: Reward, loaded: Loaded) -> Splits:
    """The pairs to learn from, to stop by, and to judge by."""
    read = loaded.reader(load_pairs, command.data_options)
    splits = split(
        read(command.pairs),
        stopping=read(command.eval_pairs) if command.eval_pairs else None,
        test=read(command.test_pairs) if command.test_pairs else None,
        eval_share=command.eval_share,
        test_share=command.test_share,
        loaded=loaded,
        on_bad_rows=command.data_options.on_bad_rows,
        seed=command.run.seed,
    )
    if not splits.stopping:
        raise DataError(
            "all pairs have one prompt, so none can be held out whose prompt is not trained on",
            where=command.pairs,
            hint="give --eval-pairs",
        )
    return splits


def summary(
    splits: Splits, state: reward_model.State, evaluation: Evaluation, loaded: Loaded, stopped: str
) -> dict[str, Any]:
    """What ``summary.json`` holds of the run. Figures without a prefix are on the test pairs, where there are some."""
    return {
        "pairs": len(splits.training),
        "stopping_pairs": len(splits.stopping),
        "test_pairs": len(splits.test),
        "dropped_rows": dict(Counter(row["kind"] for row in loaded.report.skipped)),
        "steps": state.step,
        "best_step": state.best_step,
        "stopped": stopped,
        "judged_on": "test" if splits.test else "stopping",
        "judged_prompts": evaluation.prompts,
        "accuracy": evaluation.accuracy,
        "accuracy_ci95": [evaluation.accuracy_low, evaluation.accuracy_high],
        "log_loss": evaluation.log_loss,
        "calibration_error": evaluation.calibration_error,
        "calibration_bins": evaluation.bins,
        "longer_wins": evaluation.longer_wins,
        "prefers_longer": evaluation.prefers_longer,
        "stopping_accuracy": state.best_accuracy,
        "stopping_log_loss": state.best_loss,
        "score_mean": loaded.model.config.score_mean,
        "score_std": loaded.model.config.score_std,
    }


def verdict(evaluation: Evaluation, state: reward_model.State, stopped: str, *, chosen_by: bool) -> str:
    """``held-out 65.7% ± 9.8 on 99 pairs (95% Wilson), kept step 10 of 19, stopped: no better in 4``.

    The interval goes at most as far as ± in either direction. Without test pairs the line says that the pairs are those
    that the weights were ``chosen_by``.
    """
    found = f"{evaluation.accuracy:.1%} ± {100 * evaluation.uncertainty:.1f} on {evaluation.pairs} pairs"
    of = f" of {evaluation.prompts} prompts" if evaluation.prompts < evaluation.pairs else ""
    which = " that it was chosen by" if chosen_by else ""
    kept = f"kept step {state.best_step} of {state.step}, stopped: {stopped}"
    return f"{'accuracy' if chosen_by else 'held-out'} {found}{of}{which} (95% Wilson), {kept}"


def judged_pairs(
    pairs: Sequence[PreferencePair], scores: Tensor, tokenizer: PreTrainedTokenizerBase
) -> list[JudgedPair]:
    """The rows of ``pairs``, from their raw scores [2, N]; the texts are those of the tokens, without BOS and last
    EOS."""
    eos, prompts = eos_id(tokenizer), prompts_of(pairs)
    numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids[:-1] if ids and ids[-1] == eos else ids)))

    return [
        JudgedPair(
            prompt_index=numbers[prompt],
            prompt=text(pair.prompt_ids[special_front(tokenizer, pair.prompt_ids) :]),
            chosen=text(pair.chosen_ids),
            rejected=text(pair.rejected_ids),
            chosen_score=chosen,
            rejected_score=rejected,
            margin=chosen - rejected,
            chosen_length=len(pair.chosen_ids),
            rejected_length=len(pair.rejected_ids),
        )
        for pair, prompt, (chosen, rejected) in zip(pairs, prompts, scores.T.tolist(), strict=True)
    ]
