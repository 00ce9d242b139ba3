"""What each loss of GRPO and PPO does to the optimum, and what it costs; writes the tables of docs/losses.md.

    python -m benchmarks.losses optima [NAME ...] [--steps 200] [--write]
    python -m benchmarks.losses cost [NAME ...] [--rounds 11] [--write]

``optima``: two prompts, all completions of at most two tokens from a vocabulary of eight, rewards within +-0.5 for the
first and 1 +- 0.25 for the second, beta 0.5; a tiny Llama is trained by the public step alone, four optimizer steps for
each 256 completions, so that ratios leave 1. Total variation distance, mean of the prompts, from the optimum of
E[r] - beta KL and from the one that the option itself implies, where that is another.

``cost``: what a step does, on the same completions of the embedded model, with a reward that costs nothing. Each option
takes turns with the default loss in one process; medians of the ratios of CPU seconds in one thread, of the whole step
and of what comes after sampling, and the passes of the policy that the option adds.
"""

from __future__ import annotations

import argparse
import copy
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from enumerable import Space, tiny_llama, total_variation
from helpers import FunctionScorer
from implied import Optimum, above_the_mean, among_ended, best_of, fixed_point, plain, with_entropy
from tether.algorithms import grpo, ppo
from tether.algorithms.optimise import Optim
from tether.algorithms.pending import Rollouts
from tether.algorithms.phases import PhaseClock
from tether.algorithms.policy_update import learn
from tether.algorithms.surrogate import Surrogate
from tether.generation.engine import Engine
from tether.models.loading import load_policy
from tether.models.reference import reference_of
from tether.models.trainable import trainable
from tether.types import Metrics, Prompt, Request, RolloutGroup, Sampling, ScoredGroup, make_requests
from tether.world import ALONE
from tiny import byte_tokenizer

PAGE = Path(__file__).parents[1] / "docs" / "losses.md"
BETA, ALPHA, VOCAB, SEED = 0.5, 0.1, 8, 1
PROMPTS, GROUP, EPOCHS, RATE = ((0,), (0, 3)), 128, 4, 1e-3
TARGET = 1.8
"""Of the entropy, in nats per token: above that of the plain optimum."""
DRIFT = 0.3
"""Spread of the noise in the weights of the sampler that is not quite the policy, in units of each matrix's own."""
PLAIN = plain(BETA)


def spaces() -> tuple[Space, ...]:
    """One for each prompt."""
    second = Space.of(VOCAB, 2, seed=SEED + 1, spread=0.25)
    return Space.of(VOCAB, 2, seed=SEED), replace(second, rewards=second.rewards + 1.0)


def whole(_: Space, pi: Tensor) -> Tensor:
    """All of a distribution."""
    return pi


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row."""

    flags: str
    """What the command line has."""
    options: dict[str, Any] = field(default_factory=dict)
    surrogate: Surrogate = field(default_factory=Surrogate)
    algorithm: Any = grpo
    own: Optimum | None = None
    """The optimum that the option implies, where it is not the plain one."""
    part: Callable[[Space, Tensor], Tensor] = whole
    """What the optimum is about."""
    drift: float = 0.0
    """Of the sampler."""
    said: dict[str, str] = field(default_factory=dict)
    """Metrics of the last step that the table has too, and what it calls them."""


CASES = {
    "plain": Case(flags="(the default loss)"),
    "dual clip": Case(flags="--clip-dual 3", surrogate=Surrogate(clip_dual=3.0)),
    "cispo": Case(flags="--policy-loss cispo --clip-high 4", surrogate=Surrogate(policy_loss="cispo", clip_high=4.0)),
    "sapo": Case(flags="--policy-loss sapo", surrogate=Surrogate(policy_loss="sapo")),
    "ppo": Case(flags="(ppo)", algorithm=ppo),
    "ppo cispo": Case(
        flags="(ppo) --policy-loss cispo --clip-high 4",
        surrogate=Surrogate(policy_loss="cispo", clip_high=4.0),
        algorithm=ppo,
    ),
    "ppo sapo": Case(flags="(ppo) --policy-loss sapo", surrogate=Surrogate(policy_loss="sapo"), algorithm=ppo),
    "reinforce++": Case(
        flags="--advantage-baseline batch --advantage-scale batch",
        options={"advantage_baseline": "batch", "advantage_scale": "batch"},
    ),
    "reinforce++ baseline": Case(flags="--advantage-scale batch", options={"advantage_scale": "batch"}),
    "positive only": Case(
        flags="--positive-only", options={"positive_only": True}, own=fixed_point(above_the_mean, BETA)
    ),
    "pass@2": Case(flags="--pass-at-k 2", options={"pass_at_k": 2}, own=fixed_point(best_of(2), BETA)),
    "pass@8": Case(flags="--pass-at-k 8", options={"pass_at_k": 8}, own=fixed_point(best_of(8), BETA)),
    "entropy": Case(flags=f"--entropy-coef {ALPHA}", options={"entropy_coef": ALPHA}, own=with_entropy(ALPHA, BETA)),
    "entropy target": Case(
        flags=f"--entropy-target {TARGET}", options={"entropy_target": TARGET}, said={"entropy": "entropy"}
    ),
    "mask truncated": Case(
        flags="--mask-truncated", surrogate=Surrogate(mask_truncated=True), own=PLAIN, part=among_ended
    ),
    "mismatch off": Case(
        flags="--mismatch off",
        drift=DRIFT,
        said={"sampling/logprob_gap_mean": "gap", "clip_ratio/region_mean": "clipped"},
    ),
    **{
        f"{kind} {level}": Case(
            flags=f"--mismatch {kind} --mismatch-level {level}",
            surrogate=Surrogate(mismatch=kind, mismatch_level=level),
            drift=DRIFT,
            said={
                "sampling/importance_sampling_ratio/mean": "weight",
                "sampling/importance_sampling_ratio/capped": "capped",
            },
        )
        for kind in ("tis", "mis")
        for level in ("token", "sequence")
    },
}


class Drifted:
    """A sampler whose weights are the policy's with some noise, always the same."""

    def __init__(self, model: Any, drift: float) -> None:
        own = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(SEED)
        self.noise = {
            name: drift * weight.std() * torch.randn(weight.shape, generator=generator) if weight.dim() > 1 else 0.0
            for name, weight in trainable(own).items()
        }
        self.engine = Engine(own, byte_tokenizer())
        self.load_weights(0, trainable(model).items())

    def load_weights(self, version: int, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.engine.load_weights(version, [(name, weight + self.noise[name]) for name, weight in weights])

    def generate(self, requests: Sequence[Request], *, sampling: Sampling) -> list[RolloutGroup]:
        return self.engine.generate(requests, sampling=sampling)

    def figures(self) -> Metrics:
        return self.engine.figures()


class ByPrompt:
    """Scores each prompt's completions in its own space."""

    def __init__(self, made: Sequence[Space]) -> None:
        self.made = dict(zip(PROMPTS, made, strict=True))

    def score(self, groups: list[RolloutGroup]) -> list[ScoredGroup]:
        return [scored for group in groups for scored in self.made[tuple(group.prompt.ids)].score([group])]


@dataclass(frozen=True)
class Trained:
    found: list[Tensor]
    """The distribution of each prompt."""
    reference: list[Tensor]
    """Log-probs."""
    metrics: Metrics
    """Of the last step."""


def train(case: Case, made: Sequence[Space], *, steps: int) -> Trained:
    """The case's distributions after ``steps`` steps."""
    model = tiny_llama(VOCAB, seed=SEED)
    own = {"advantage_scale": "none", "loss_reduction": "token_mean"} if case.algorithm is grpo else {}
    defaults = case.algorithm.Config().optim
    config = case.algorithm.Config(
        group_size=GROUP,
        kl_coef=BETA,
        epochs_per_step=EPOCHS,
        sampling=Sampling(max_new_tokens=2),
        optim=replace(defaults, learning_rate=RATE),
        surrogate=case.surrogate,
        **{**own, **case.options},
    )
    with torch.no_grad():
        reference = [space.logprobs(model, prompt=prompt) for space, prompt in zip(made, PROMPTS, strict=True)]
    state = case.algorithm.State.create(
        model, config, reference=reference_of(model), prompts=2, total_steps=steps, seed=0
    )
    engine = Drifted(model, case.drift) if case.drift else Engine(model, byte_tokenizer())
    prompts = [Prompt(ids=prompt, text="") for prompt in PROMPTS]
    metrics: Metrics = {}
    for _ in range(steps):
        metrics = case.algorithm.step(state, prompts, generator=engine, scorer=ByPrompt(made), config=config).metrics
    with torch.no_grad():
        found = [space.logprobs(model, prompt=prompt).exp() for space, prompt in zip(made, PROMPTS, strict=True)]
    return Trained(found, reference, metrics)


def distance(trained: Trained, made: Sequence[Space], optimum: Optimum, *, part: Any = whole) -> float:
    """Mean over the prompts of the total variation distance to ``optimum``, of ``part`` of the distribution."""
    return statistics.mean(
        total_variation(part(space, found), part(space, optimum(space, reference)))
        for space, found, reference in zip(made, trained.found, trained.reference, strict=True)
    )


def optima(names: Sequence[str], steps: int) -> list[str]:
    """The rows of the table."""
    made, rows = spaces(), []
    for name in names:
        case, start = CASES[name], time.monotonic()
        trained = train(case, made, steps=steps)
        figures = [f"{distance(trained, made, PLAIN):.3f}", "the same", ""]
        if case.own is not None:
            figures[1] = f"**{distance(trained, made, case.own, part=case.part):.3f}**"
            apart = distance(
                replace(trained, found=[case.own(s, r) for s, r in zip(made, trained.reference, strict=True)]),
                made,
                PLAIN,
            )
            figures[2] = f"{apart:.3f}"
        said = ", ".join(f"{text} {trained.metrics[key]:.2f}" for key, text in case.said.items())
        rows.append(f"| `{case.flags}` | {' | '.join(figures)} | {said} |")
        print(f"{rows[-1]}  {time.monotonic() - start:.0f} s", flush=True)
    return rows


# -- the cost ----------------------------------------------------------------------------------------------------------

COSTS: dict[str, dict[str, Any]] = {
    "(the default loss, against itself)": {},
    "--clip-dual 3": {"surrogate": Surrogate(clip_dual=3.0)},
    "--policy-loss cispo": {"surrogate": Surrogate(policy_loss="cispo")},
    "--policy-loss sapo": {"surrogate": Surrogate(policy_loss="sapo")},
    "--mismatch tis": {"surrogate": Surrogate(mismatch="tis")},
    "--mismatch mis --mismatch-level sequence": {"surrogate": Surrogate(mismatch="mis", mismatch_level="sequence")},
    "--mask-truncated": {"surrogate": Surrogate(mask_truncated=True)},
    "--advantage-baseline batch --advantage-scale batch": {"advantage_baseline": "batch", "advantage_scale": "batch"},
    "--positive-only": {"positive_only": True},
    "--pass-at-k 4": {"pass_at_k": 4},
    "--entropy-coef 0.01": {"entropy_coef": 0.01},
}
COST_PROMPTS, COST_GROUP, COST_TOKENS = 3, 8, 32


def costs(names: Sequence[str], rounds: int) -> list[str]:
    """The rows of the table."""
    torch.set_num_threads(1)
    model, tokenizer = load_policy("base")
    reference, calls = reference_of(model), [0]
    model.base_model.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    sampling = Sampling(max_new_tokens=COST_TOKENS)
    prompts = [Prompt(ids=tuple(range(20 + i, 40 + i)), text="") for i in range(COST_PROMPTS)]
    asked, engine = make_requests(prompts, group_size=COST_GROUP, seed=0), Engine(model, tokenizer)
    start = time.process_time()
    drawn = engine.generate(asked, sampling=sampling)
    sampled = time.process_time() - start
    groups = tuple(FunctionScorer(lambda _, c: len(set(c.ids))).score(drawn))

    def once(name: str) -> tuple[float, int]:
        """CPU seconds and passes of the policy, which does not move."""
        config = grpo.Config(group_size=COST_GROUP, sampling=sampling, optim=Optim(learning_rate=1e-12), **COSTS[name])
        state = grpo.State.create(model, config, reference=reference, prompts=1, total_steps=1, seed=0)
        rollouts = Rollouts(groups=groups, figures={}, clock=PhaseClock(model.device))
        calls[0], start = 0, time.process_time()
        update = grpo.collect(state, rollouts, prompts, config=config, where="cost", world=ALONE)
        of_rows = partial(grpo.objective, model, config=config, entropy_coef=config.entropy_coef)
        learn(state, update, of_rows, grpo.plan_of(config), where="cost", world=ALONE)
        return time.process_time() - start, calls[0]

    default = next(iter(COSTS))
    for name in (default, *names):
        once(name)  # does not count
    rows = []
    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    passes: dict[str, int] = {}
    for number in range(rounds):
        for name in names:
            first, second = (once(one) for one in ((name, default) if number % 2 else (default, name)))
            (seconds, used), (base, plainly) = (first, second) if number % 2 else (second, first)
            ratios[name].append((seconds / base, (seconds + sampled) / (base + sampled)))
            passes[name] = used - plainly
    for name in names:
        update, step = (sorted(one) for one in zip(*ratios[name], strict=True))
        low, high = step[rounds // 4], step[-1 - rounds // 4]
        of_step, of_update = statistics.median(step), statistics.median(update)
        rows.append(f"| `{name}` | {of_step:.3f} | {low:.3f} to {high:.3f} | {of_update:.3f} | {passes[name]} |")
        print(rows[-1], flush=True)
    print(f"the default loss: {once(default)[0]:.3f} s, and sampling {sampled:.3f} s")
    return rows


def write(table: str, rows: Sequence[str]) -> None:
    """Put ``rows`` in the place of those of ``table`` in the page."""
    begin, end = f"<!-- {table}: python -m benchmarks.losses {table} --write -->", f"<!-- end of {table} -->"
    text = PAGE.read_text(encoding="utf-8")
    head = re.search(f"{re.escape(begin)}\n\n(\\|.*\n\\|[-|]+\n)", text)
    assert head is not None, f"{PAGE} has no table {table}"
    before, after = text[: head.end()], text[text.index(end) :]
    PAGE.write_text(before + "\n".join(rows) + f"\n\n{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("optima", "cost"))
    parser.add_argument("names", nargs="*", help="rows; by default all of them")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--write", action="store_true", help="put the rows into docs/losses.md")
    args = parser.parse_args()
    rows = (
        optima(args.names or list(CASES), args.steps)
        if args.table == "optima"
        else costs(args.names or list(COSTS), args.rounds)
    )
    if args.write:
        write(args.table, rows)


if __name__ == "__main__":
    main()
