"""``tether reward``: reward-model training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from tether.algorithms import reward_model
from tether.config import DataOptions, RunOptions
from tether.data.checks import keep_apart
from tether.data.fingerprint import fingerprint
from tether.data.records import load_pairs
from tether.data.splitting import hold_out, prompt_key
from tether.data.tokenise import special_front
from tether.errors import ConfigError, DataError
from tether.models.reward import new_reward_model, save_reward_model
from tether.runtime.state import RunState
from tether.seeds import derive_seed
from tether.training.common import NEW, Loaded, Start, finish, load, open_run, reader, save
from tether.types import Monitor, PreferencePair


@dataclass(frozen=True, kw_only=True)
class Reward:
    """Train a reward model on preference pairs."""

    model: str
    """Language model to start from: a directory, a hub id or 'base'."""
    pairs: str
    """Rows with chosen and rejected, with or without prompt and margin: a file or a hub id."""
    eval_pairs: str | None = None
    """Held-out pairs; unless given, a share of the pairs is held out, all pairs of a prompt together."""
    eval_share: float = 0.1
    """Share of the pairs that is held out when no eval_pairs are given."""
    data_options: DataOptions = field(default_factory=DataOptions)
    run: RunOptions
    reward: reward_model.Config = field(default_factory=reward_model.Config)

    def __post_init__(self) -> None:
        ConfigError.unless({"eval_share must lie between 0 and 1": 0 < self.eval_share < 1})


def train(command: Reward, start: Start = NEW, *, monitors: Sequence[Monitor] = ()) -> None:
    """Load, train, save the best weights, and sum up."""
    run = command.run
    loaded = load(run, start, partial(new_reward_model, command.model, seed=run.seed))
    model = loaded.model
    pairs, held_out = load_both(command, loaded)
    loaded.fingerprints.update(pairs=fingerprint(pairs), eval_pairs=fingerprint(held_out))
    state = reward_model.State.create(model, len(pairs), command.reward, seed=run.seed)
    recorder = open_run(
        command, start, loaded, title="reward", state=RunState(state, tuple(monitors)), total=state.total_steps
    )
    with recorder.session(stop_after=run.stop_after_seconds):
        for result in reward_model.steps(state, pairs, held_out, config=command.reward, world=recorder.world):
            recorder.record(state.step, result, last=state.over(command.reward))
        evaluation = reward_model.finish(state, pairs, held_out)
        probes = reward_model.sides(held_out[:8])
        save(recorder, lambda path: save_reward_model(model, loaded.tokenizer, path, probes))
        summary = {
            "pairs": len(pairs),
            "held_out_pairs": len(held_out),
            "steps": state.step,
            "best_step": state.best_step,
            "accuracy": evaluation.accuracy,
            "log_loss": evaluation.log_loss,
            "calibration_error": evaluation.calibration_error,
            "calibration_bins": evaluation.bins,
            "score_mean": model.config.score_mean,
            "score_std": model.config.score_std,
        }
        finish(recorder, summary, quiet=run.quiet)


def load_both(command: Reward, loaded: Loaded) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """The pairs to learn from and those held out."""
    read = reader(load_pairs, loaded, command.data_options)
    pairs: list[PreferencePair] = read(command.pairs)
    if command.eval_pairs:
        held_out: list[PreferencePair] = read(command.eval_pairs)
        return keep_apart(pairs, held_out, report=loaded.report, on_bad_rows=command.data_options.on_bad_rows), held_out
    front = special_front(loaded.tokenizer, loaded.tokenizer("")["input_ids"])
    keys = [prompt_key(pair, loaded.report.origin(pair)[0].values, front=front) for pair in pairs]
    training, held = hold_out(keys, share=command.eval_share, seed=derive_seed(command.run.seed, "held out"))
    if not held:
        raise DataError(
            "all pairs have one prompt, so none can be held out whose prompt is not trained on",
            where=command.pairs,
            hint="give --eval-pairs",
        )
    held_out, pairs = [pairs[i] for i in held], [pairs[i] for i in training]
    # a pair that the file holds twice may lie on both sides of the cut
    return keep_apart(pairs, held_out, report=loaded.report, on_bad_rows="skip"), held_out
