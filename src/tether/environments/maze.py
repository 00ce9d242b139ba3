"""A maze written as text, with a reward at every move.

    ..#.     '#' is a wall, S the start and G the goal. The last line of a prompt names the cell that the walker is in,
    S#.G     by column (a letter) and row (a digit): here a2. A move is one of U, D, L and R; after each the
    ....     environment shows the cell. A move into a wall or out of the maze, and anything else, changes nothing.
    a2

    r(s, a) = -distance(s', goal) after the move, 0 at the goal, where the episode ends.

The distance is that of the shortest path, or Manhattan's. :func:`values` and :func:`best_move` are exact, by dynamic
programming; nothing here knows a model.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from tether.errors import EpisodeError
from tether.generation.environment import Observation
from tether.types import Prompt
from tether.untrusted import shown

Cell = tuple[int, int]
"""Row and column, from 0."""
Distance = Literal["path", "manhattan"]
DISTANCES: tuple[Distance, ...] = get_args(Distance)

MOVES: Mapping[str, Cell] = {"U": (-1, 0), "D": (1, 0), "L": (0, -1), "R": (0, 1)}
LARGEST = 9
"""Cells on a side: a cell has a name of two characters."""
TRIES = 10_000


def cell_name(cell: Cell) -> str:
    """
    >>> cell_name((0, 0)), cell_name((1, 3))
    ('a1', 'd2')
    """
    row, column = cell
    return f"{chr(ord('a') + column)}{row + 1}"


@dataclass(frozen=True)
class Maze:
    """A maze whose goal can be reached from every free cell."""

    rows: tuple[str, ...]
    """Each with '.', '#', 'S' and 'G'."""

    @property
    def text(self) -> str:
        """The prompt."""
        return "".join(f"{row}\n" for row in self.rows) + cell_name(self.start)

    @cached_property
    def start(self) -> Cell:
        return self._only("S")

    @cached_property
    def goal(self) -> Cell:
        return self._only("G")

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """The free cells."""
        return tuple((i, j) for i, row in enumerate(self.rows) for j, what in enumerate(row) if what != "#")

    def _only(self, what: str) -> Cell:
        return next((i, row.index(what)) for i, row in enumerate(self.rows) if what in row)

    def after(self, cell: Cell, move: str) -> Cell:
        """Where a move leads."""
        if move not in MOVES:
            return cell
        row, column = cell[0] + MOVES[move][0], cell[1] + MOVES[move][1]
        inside = 0 <= row < len(self.rows) and 0 <= column < len(self.rows[0])
        return (row, column) if inside and self.rows[row][column] != "#" else cell

    @cached_property
    def path_lengths(self) -> dict[Cell, int]:
        """Moves of the shortest path to the goal, of each cell from which there is one."""
        found, queue = {self.goal: 0}, deque([self.goal])
        while queue:
            cell = queue.popleft()
            for move in MOVES:  # moves can be undone, so those from the goal lead the same ways
                if (near := self.after(cell, move)) not in found:
                    found[near] = found[cell] + 1
                    queue.append(near)
        return found

    def distance(self, cell: Cell, kind: Distance = "path") -> int:
        """From a cell to the goal."""
        if kind == "manhattan":
            return abs(cell[0] - self.goal[0]) + abs(cell[1] - self.goal[1])
        return self.path_lengths[cell]


def parse(text: str) -> Maze:
    """The maze of a prompt. Raises :class:`ValueError` that says what is wrong."""
    *lines, name = text.rstrip("\n").split("\n")
    sides = {len(lines), *map(len, lines)}
    if not lines or min(sides) < 1 or max(sides) > LARGEST or len(set(map(len, lines))) > 1:
        raise ValueError(f"a maze has 1 to {LARGEST} rows of one length, of at most {LARGEST} cells")
    grid = "".join(lines)
    if not set(grid) <= set(".#SG") or grid.count("S") != 1 or grid.count("G") != 1:
        raise ValueError("a maze consists of '.', '#', one S and one G")
    maze = Maze(tuple(lines))
    if name != cell_name(maze.start):
        raise ValueError(f"its last line is {name!r}, and S is in {cell_name(maze.start)}")
    if maze.start not in maze.path_lengths:
        raise ValueError("the goal cannot be reached from S")
    return maze


def random_maze(size: int, walls: int, rng: random.Random) -> Maze:
    """A square maze of ``size`` cells on a side, drawn uniformly from those with ``walls`` walls whose free cells are
    all connected. Raises :class:`ValueError` where hardly any maze is like that."""
    cells = [(i, j) for i in range(size) for j in range(size)]
    if walls + 2 > len(cells):
        raise ValueError(f"a maze of {size} by {size} cells has no room for {walls} walls, a start and a goal")
    for _ in range(TRIES):
        start, goal, *blocked = rng.sample(cells, walls + 2)
        grid = [["."] * size for _ in range(size)]
        for (i, j), what in [(start, "S"), (goal, "G"), *[(cell, "#") for cell in blocked]]:
            grid[i][j] = what
        maze = Maze(tuple("".join(row) for row in grid))
        if len(maze.path_lengths) == len(maze.cells):
            return maze
    raise ValueError(f"hardly any maze of {size} by {size} cells with {walls} walls is connected")


def random_walk(maze: Maze, moves: int, rng: random.Random) -> str:
    """A walk of random moves, which ends at the goal or after ``moves``, as an episode is written: each move, and the
    cell that it leads to."""
    cell, written = maze.start, ""
    for _ in range(moves):
        move = rng.choice(list(MOVES))
        cell = maze.after(cell, move)
        written += move + cell_name(cell)
        if cell == maze.goal:
            break
    return written


Policy = Mapping[Cell, Mapping[str, float]]
"""Probabilities of the moves in each cell."""


def values(
    maze: Maze, *, gamma: float, moves: int, kind: Distance = "path", policy: Policy | None = None
) -> list[dict[Cell, float]]:
    """V_n(s), the return of the best moves from s when n are left, or of the moves of ``policy``; n = 0..``moves``.

        V_0(s) = 0,  V_n(s) = max_a (or the mean over the policy's a of) r(s, a) + gamma V_{n-1}(s')

    with V_n(goal) = 0: value iteration (Bellman 1957), exact for a limited number of moves.
    """
    found = [dict.fromkeys(maze.cells, 0.0)]
    for _ in range(moves):
        before, now = found[-1], {maze.goal: 0.0}
        for cell in maze.cells:
            if cell == maze.goal:
                continue
            worth = {}
            for move in MOVES:
                then = maze.after(cell, move)
                worth[move] = -maze.distance(then, kind) + gamma * before[then]
            if policy is None:
                now[cell] = max(worth.values())
            else:
                now[cell] = sum(policy[cell][move] * worth[move] for move in MOVES)
        found.append(now)
    return found


def uniform(maze: Maze) -> Policy:
    """The policy that takes every move alike."""
    return {cell: dict.fromkeys(MOVES, 1 / len(MOVES)) for cell in maze.cells}


class MazeEnvironment:
    """The walker, from the maze of its prompt. ``info`` has ``arrived``, 1 at the goal, and ``moves``."""

    def __init__(self, distance: Distance = "path") -> None:
        self.kind: Distance = distance

    def reset(self, prompt: Prompt, *, seed: int) -> Observation:  # noqa: ARG002 - the prompt says all
        try:
            self.maze = parse(prompt.text)
        except ValueError as error:
            raise EpisodeError(
                f"the prompt {shown(prompt.text)} is no maze: {error}", where="maze", hint="--prompts maze makes some"
            ) from None
        self.cell, self.moves = self.maze.start, 0
        return Observation()

    def step(self, action: str) -> Observation:
        self.cell = self.maze.after(self.cell, action.strip())
        self.moves += 1
        arrived = self.cell == self.maze.goal
        return Observation(
            text=cell_name(self.cell),
            reward=0.0 - self.maze.distance(self.cell, self.kind),
            done=arrived,
            info={"arrived": float(arrived), "moves": float(self.moves)},
        )


def rows(*, count: int, seed: int, size: int, walls: int, moves: int) -> Sequence[dict[str, Any]]:
    """Rows of different mazes, each with a random walk as its completion."""
    rng = random.Random(f"maze {seed}")
    found: dict[str, dict[str, Any]] = {}
    tries = 0
    while len(found) < count:
        maze = random_maze(size, walls, rng)
        found.setdefault(maze.text, {"prompt": maze.text, "completion": random_walk(maze, moves, rng)})
        tries += 1
        if tries > 100 * count:
            raise ValueError(f"there are not {count} different mazes of this size")
    return list(found.values())
