"""``tether maze``: the general problem of reinforcement learning on a task whose optimum is known.

    maximise E[sum_t gamma^t r(s_t, a_t)],  r = -distance to the goal after each move

    a small model with random weights -> fine-tuned on random walks -> PPO with a critic, for each gamma
        -> on held-out mazes: the return beside the best one, and the critic's values beside dynamic programming

Every stage is one of tether's own commands, and its run directory can be inspected, reported on and repeated like any
other (:mod:`tether.environments.maze` has the maze, and its values by dynamic programming).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether import config
from tether.algorithms import ppo, sft
from tether.algorithms.optimise import Optim
from tether.data.records import load_prompts
from tether.environments.generated import made
from tether.environments.maze import Cell, Maze, MazeEnvironment, cell_name, parse, uniform, values
from tether.environments.maze_model import write_maze_model
from tether.generation.engine import Engine
from tether.generation.episodes import Episodes
from tether.models.loading import context_length, load_policy
from tether.models.policy import Critic, completion_states, load_critic
from tether.report.maze import Drawn, maze_figure
from tether.report.plots import require_matplotlib
from tether.runtime.directory import RunDirectory
from tether.training.ppo import CRITIC, PPO
from tether.training.ppo import train as train_ppo
from tether.training.sft import SFT
from tether.training.sft import train as train_sft
from tether.types import Batch, Completion, Prompt, RolloutGroup, Sampling, make_requests

SCALE = 0.1
"""Weight of the rewards: returns of a few tens are far from the zero at which a critic begins."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes and rates. The defaults take two cores about ten minutes for each gamma."""

    seed: int = 0
    gammas: Sequence[float] = (1.0, 0.9, 0.5)
    size: int = 4
    walls: int = 3
    moves: int = 10
    """Moves of an episode, at most."""
    mazes: int = 20_000
    held_out: int = 256
    width: int = 64
    layers: int = 4
    steps: int = 600
    """Of PPO, for each gamma."""
    prompts_per_step: int = 256
    sft: sft.Config = field(
        default_factory=lambda: sft.Config(epochs=5.0, batch_size=64, optim=Optim(learning_rate=3e-3))
    )
    optim: Optim = field(
        default_factory=lambda: Optim(learning_rate=1e-3, adam_beta2=0.95, adam_eps=1e-5, warmup_steps=5)
    )

    @property
    def data(self) -> str:
        """The mazes to train on."""
        return self._mazes(self.mazes, 2 * self.seed)

    @property
    def held_out_data(self) -> str:
        return self._mazes(self.held_out, 2 * self.seed + 1)

    def _mazes(self, count: int, seed: int) -> str:
        return f"maze:count={count},seed={seed},size={self.size},walls={self.walls},moves={self.moves}"

    @property
    def sampling(self) -> Sampling:
        """A move is a token, and so is the cell that is shown after each but the last."""
        return Sampling(max_new_tokens=2 * self.moves - 1)

    def ppo(self, gamma: float) -> ppo.Config:
        """Without a KL penalty, which would change what is best."""
        return ppo.Config(
            gamma=gamma,
            discount="turn",
            lam=0.7,
            kl_coef=0.0,
            entropy_coef=0.003,
            epochs_per_step=2,
            minibatches=min(8, self.prompts_per_step),
            value_coef=0.5,
            value_clip=10.0,
            sampling=self.sampling,
            optim=self.optim,
        )


def solve(out: Path, settings: Settings, *, overwrite: bool = False) -> dict[str, Any]:
    """Everything, into ``out``; gives what ``summary.json`` holds."""
    started = time.monotonic()
    directory = RunDirectory(out, {"command": "maze", "seed": settings.seed}, overwrite=overwrite)
    require_matplotlib()
    directory.make()
    write_maze_model(out / "random", seed=settings.seed, width=settings.width, layers=settings.layers)
    say("fine-tuning a model with random weights on random walks")
    data = config.DataOptions(on_bad_rows="skip")  # a few mazes are drawn for both sets
    run = config.RunOptions(out=str(out / "sft"), seed=settings.seed)
    train_sft(
        SFT(
            model=str(out / "random"),
            data=settings.data,
            eval_data=settings.held_out_data,
            data_options=data,
            run=run,
            sft=settings.sft,
        )
    )
    mazes = [parse(row["prompt"]) for row in rows_of(settings.held_out_data)]
    found, drawn = {}, []
    for gamma in settings.gammas:
        say(f"PPO at gamma {gamma:g}")
        begun, name = time.monotonic(), f"ppo_{gamma:g}"
        train_policy(out, name, settings, gamma)
        policy, tokenizer = load_policy(str(out / name / "model"))
        critic = load_critic(out / name / CRITIC, policy)
        seconds = time.monotonic() - begun
        measured = Measured(policy, tokenizer, critic, settings, gamma)
        found[f"{gamma:g}"] = {"seconds": seconds, **measured.figures(mazes)}
        drawn.append(measured.drawn(mazes[example(mazes)]))
    maze_figure(drawn, out / "maze.png")
    summary = {"gamma": found, "seconds": time.monotonic() - started}
    directory.summary(summary)
    print_summary(summary)
    return summary


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def rows_of(source: str) -> Sequence[dict[str, Any]]:
    rows: Any = made(source)
    return list(rows.values)


def train_policy(out: Path, name: str, settings: Settings, gamma: float) -> None:
    """PPO from the model that knows the walks."""
    task = config.PromptOptions(
        prompts=settings.data,
        rollouts_every=0,
        environment=config.EnvironmentOptions(env="maze", env_weight=SCALE, max_turns=settings.moves, turn_tokens=1),
        evaluation=config.EvaluationOptions(eval_prompts=settings.held_out_data, eval_group_size=1),
        data=config.DataOptions(on_bad_rows="skip"),
    )
    train_ppo(
        PPO(
            model=str(out / "sft" / "model"),
            task=task,
            run=config.RunOptions(out=str(out / name), seed=settings.seed, save_every=100),
            length=config.Steps(steps=settings.steps, prompts_per_step=settings.prompts_per_step),
            save_critic=True,
            ppo=settings.ppo(gamma),
        )
    )


@dataclass(frozen=True)
class Measured:
    """A policy and its critic, beside what is exact."""

    policy: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    critic: Critic
    settings: Settings
    gamma: float

    def figures(self, mazes: Sequence[Maze]) -> dict[str, float]:
        """On ``mazes``: mean returns of the most likely moves, of the best ones and of random ones; the share of the
        way from random to the best; and how far the critic is from V of the best moves on the states that were
        visited, over the spread of V there."""
        groups = self.played(mazes)
        walks = [group.completions[0] for group in groups]
        own = [sum(self.gamma**i * turn.reward for i, turn in enumerate(walk.turns)) for walk in walks]
        best = [self.exact(maze)[-1][maze.start] for maze in mazes]
        at_random = [self.exact(maze, at_random=True)[-1][maze.start] for maze in mazes]
        mean, most, least = (sum(one) / len(mazes) for one in (own, best, at_random))
        judged, exact = self.on_visited(mazes, groups)
        spread = (exact.max() - exact.min()).item() or 1.0
        return {
            "return": mean,
            "best": most,
            "random": least,
            "share_of_best": (mean - least) / (most - least),
            "arrived": sum(walk.turns[-1].info["arrived"] for walk in walks) / len(walks),
            "value_rmse": (judged - exact).square().mean().sqrt().item() / spread,
            "value_mean_error": (judged - exact).abs().mean().item() / spread,
            "visited": float(len(exact)),
        }

    def exact(self, maze: Maze, *, at_random: bool = False) -> list[dict[Cell, float]]:
        policy = uniform(maze) if at_random else None
        return values(maze, gamma=self.gamma, moves=self.settings.moves, policy=policy)

    def played(self, mazes: Sequence[Maze]) -> list[RolloutGroup]:
        """An episode in each maze, of the most likely moves."""
        limits = Episodes(make=MazeEnvironment, max_turns=self.settings.moves, turn_tokens=1)
        engine = Engine(self.policy, self.tokenizer, episodes=limits)
        sampling = Sampling(max_new_tokens=self.settings.sampling.max_new_tokens, temperature=0.0)
        return engine.generate(make_requests(self.prompts(mazes), group_size=1, seed=0), sampling=sampling)

    def prompts(self, mazes: Sequence[Maze]) -> list[Prompt]:
        rows: Any = [{"prompt": maze.text} for maze in mazes]
        limit = self.settings.sampling.max_new_tokens
        return load_prompts(rows, self.tokenizer, context=context_length(self.policy), max_new_tokens=limit)

    @torch.no_grad()
    def judged(self, rows: Sequence[tuple[Prompt, Completion]]) -> Tensor:
        """The critic's values of the states before each move, row by row, in units of the maze's rewards."""
        batch = Batch.collate(
            [(prompt.ids, completion.ids) for prompt, completion in rows],
            self.policy.device,
            masks=[completion.mask for _, completion in rows],
        )
        found = self.critic(batch, lambda: completion_states(self.policy.base_model, batch))
        return found[batch.mask] / SCALE

    def on_visited(self, mazes: Sequence[Maze], groups: Sequence[RolloutGroup]) -> tuple[Tensor, Tensor]:
        """The critic's values of the states of the episodes, and those of the best moves."""
        rows = [(group.prompt, group.completions[0]) for group in groups]
        exact = []
        for maze, (_, walk) in zip(mazes, rows, strict=True):
            table, cell, left = self.exact(maze), maze.start, self.settings.moves
            for turn in walk.turns:
                exact.append(table[left][cell])
                cell, left = maze.after(cell, self.said(walk, turn.start)), left - 1
        return self.judged(rows), torch.tensor(exact)

    def said(self, walk: Completion, place: int) -> str:
        return str(self.tokenizer.decode([walk.ids[place]]))

    def drawn(self, maze: Maze) -> list[Drawn]:
        """The values over the maze, exact and the critic's, with the shortest path and that of the policy."""
        starts = [moved(maze, cell) for cell in maze.cells if cell != maze.goal]
        groups = self.played([maze, *starts])
        judged = self.judged([(group.prompt, first_move(group.completions[0])) for group in groups[1:]]).tolist()
        table = self.exact(maze)
        cell, path = maze.start, [maze.start]
        for turn in groups[0].completions[0].turns:
            cell = maze.after(cell, self.said(groups[0].completions[0], turn.start))
            path.append(cell)
        exact = {one.start: table[-1][one.start] for one in starts} | {maze.goal: 0.0}
        critic = {one.start: value for one, value in zip(starts, judged, strict=True)} | {maze.goal: 0.0}
        size, walls = (
            self.settings.size,
            [(i, j) for i, row in enumerate(maze.rows) for j, what in enumerate(row) if what == "#"],
        )
        name = f"gamma {self.gamma:g}"
        return [
            Drawn(title=f"{name}: exact", size=size, walls=walls, values=exact, path=shortest(maze), goal=maze.goal),
            Drawn(title=f"{name}: critic and policy", size=size, walls=walls, values=critic, path=path, goal=maze.goal),
        ]


def first_move(walk: Completion) -> Completion:
    """The walk after its first token."""
    return replace(walk, ids=walk.ids[:1], mask=walk.mask[:1], sampler_logp=walk.sampler_logp[:1], turns=())


def moved(maze: Maze, start: Cell) -> Maze:
    """The maze with another start."""
    grid = [[{"S": "."}.get(what, what) for what in row] for row in maze.rows]
    grid[start[0]][start[1]] = "S"
    return Maze(tuple("".join(row) for row in grid))


def shortest(maze: Maze) -> list[Cell]:
    """A shortest path from start to goal."""
    path = [maze.start]
    while path[-1] != maze.goal:
        near = {maze.after(path[-1], move) for move in "UDLR"}
        path.append(min(near, key=lambda cell: (maze.path_lengths[cell], cell_name(cell))))
    return path


def example(mazes: Sequence[Maze]) -> int:
    """The first of the mazes whose shortest path is a detour, or else the first."""
    detours = [maze.distance(maze.start) > maze.distance(maze.start, "manhattan") for maze in mazes]
    return detours.index(True) if any(detours) else 0


def print_summary(summary: dict[str, Any]) -> None:
    """A table of the figures."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Held-out mazes", title_justify="left")
    for name in ("gamma", "return", "best", "random", "share of best", "arrived", "critic's error", "minutes"):
        table.add_column(name, justify="right")
    for gamma, row in summary["gamma"].items():
        figures = [row[key] for key in ("return", "best", "random")]
        shares = [row[key] for key in ("share_of_best", "arrived", "value_mean_error")]
        texts = [f"{one:.2f}" for one in figures] + [f"{one:.3f}" for one in shares]
        table.add_row(gamma, *texts, f"{row['seconds'] / 60:.1f}")
    Console().print(table)


def main(command: config.MazeOptions) -> None:
    gammas = command.gamma or Settings().gammas
    solve(Path(command.out), Settings(seed=command.seed, gammas=gammas), overwrite=command.overwrite)
