"""The maze: its text, its moves, and its values by dynamic programming beside enumerated walks."""

from __future__ import annotations

import itertools
import random

import pytest

from tether.environments.maze import (
    MOVES,
    Maze,
    MazeEnvironment,
    cell_name,
    parse,
    random_maze,
    random_walk,
    rows,
    uniform,
    values,
)
from tether.errors import EpisodeError
from tether.types import Prompt

CORNER = Maze(("S.", "#G"))
BEND = Maze(("S#G", "...", ".#."))


def test_distances_by_hand():
    assert BEND.path_lengths == {(0, 2): 0, (1, 2): 1, (1, 1): 2, (2, 2): 2, (1, 0): 3, (0, 0): 4, (2, 0): 4}
    assert BEND.distance((0, 0)) == 4
    assert BEND.distance((0, 0), "manhattan") == 2


def test_a_move_into_a_wall_out_of_the_maze_or_of_no_name_changes_nothing():
    assert [BEND.after((0, 0), move) for move in ("U", "L", "R", "", "x", "D")] == [(0, 0)] * 5 + [(1, 0)]


def test_values_by_hand():
    """S -> right (-1), down (0): at gamma 0.5 with two moves left -1 + 0.5 * 0."""
    found = values(CORNER, gamma=0.5, moves=2)
    assert found[0] == {(0, 0): 0.0, (0, 1): 0.0, (1, 1): 0.0}
    assert found[1] == {(0, 0): -1.0, (0, 1): 0.0, (1, 1): 0.0}
    assert found[2] == {(0, 0): -1.0, (0, 1): 0.0, (1, 1): 0.0}
    # at random: from (0, 1), U and R stay (-1), L leads back (-2), D arrives (0)
    assert values(CORNER, gamma=0.5, moves=1, policy=uniform(CORNER))[1][(0, 1)] == pytest.approx(-1.0)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.5])
def test_values_are_those_of_all_walks(gamma):
    """The best and the mean of the returns of every sequence of four moves."""
    maze, moves = BEND, 4
    returns = []
    for walk in itertools.product(MOVES, repeat=moves):
        cell, total = maze.start, 0.0
        for step, move in enumerate(walk):
            cell = maze.after(cell, move)
            total -= gamma**step * maze.distance(cell)
            if cell == maze.goal:
                break
        returns.append(total)
    assert values(maze, gamma=gamma, moves=moves)[-1][maze.start] == pytest.approx(max(returns))
    found = values(maze, gamma=gamma, moves=moves, policy=uniform(maze))[-1][maze.start]
    assert found == pytest.approx(sum(returns) / len(returns))


def test_an_episode():
    env = MazeEnvironment()
    assert env.reset(Prompt(ids=(), text=BEND.text), seed=1).text == ""
    seen = [env.step(action) for action in ("U", " D", "R\n", "R", "U")]
    assert [one.text for one in seen] == ["a1", "a2", "b2", "c2", "c1"]
    assert [one.reward for one in seen] == [-4.0, -3.0, -2.0, -1.0, 0.0]
    assert [one.done for one in seen] == [False] * 4 + [True]
    assert seen[-1].info == {"arrived": 1.0, "moves": 5.0}


def test_manhattan():
    env = MazeEnvironment("manhattan")
    env.reset(Prompt(ids=(), text=BEND.text), seed=1)
    assert env.step("D").reward == -3.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "1 to 9 rows"),
        ("S.\n.\na1", "1 to 9 rows of one length"),
        ("S.\nx.\na1", "consists of"),
        ("SS\n.G\na1", "consists of"),
        ("S.\n.G\nb1", "S is in a1"),
        ("S#\n#G\na1", "cannot be reached"),
    ],
)
def test_what_is_no_maze_is_refused(text, message):
    with pytest.raises(EpisodeError, match=message):
        MazeEnvironment().reset(Prompt(ids=(), text=text), seed=0)


def test_mazes_are_connected_read_back_and_are_all_different():
    found = rows(count=200, seed=3, size=4, walls=5, moves=6)
    assert len({row["prompt"] for row in found}) == 200
    for row in found:
        maze = parse(row["prompt"])
        assert maze.text == row["prompt"]
        assert row["prompt"].count("#") == 5
        assert set(maze.path_lengths) == set(maze.cells)


def test_a_walk_is_written_as_its_episode():
    maze = random_maze(4, 3, random.Random(5))
    walk = random_walk(maze, 7, random.Random(6))
    env = MazeEnvironment()
    env.reset(Prompt(ids=(), text=maze.text), seed=0)
    moves = [walk[i : i + 3] for i in range(0, len(walk), 3)]
    assert "".join(move[0] + env.step(move[0]).text for move in moves) == walk
    assert 1 <= len(moves) <= 7


def test_names_of_cells():
    assert cell_name((2, 0)) == "a3"
