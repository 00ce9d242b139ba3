"""The figure of the architecture is what the code gives."""

from __future__ import annotations

import pytest
from scripts import architecture
from scripts.architecture import Part


def test_the_figure_is_up_to_date():
    assert architecture.FIGURE.read_text(encoding="utf-8") == architecture.drawing(), (
        "run python -m scripts.architecture"
    )


def test_layers_are_the_longest_chains():
    graph = {"top": {"middle", "ground"}, "middle": {"ground"}, "ground": set(), "beside": {"ground"}}
    found = architecture.layers({name: Part(name, (), frozenset(down)) for name, down in graph.items()})
    assert [[part.name for part in layer] for layer in found] == [["ground"], ["beside", "middle"], ["top"]]


def test_a_circle_is_refused():
    circle = {name: Part(name, (), frozenset({other})) for name, other in (("a", "b"), ("b", "a"))}
    with pytest.raises(ValueError, match="a -> b -> a"):
        architecture.layers(circle)


def test_a_path_in_another_order_is_refused():
    names = [name for name, _ in architecture.STATIONS]
    architecture.check_path(["before", *names, "after"])
    with pytest.raises(ValueError, match=names[0]):
        architecture.check_path(names[1:])
    with pytest.raises(ValueError, match=names[1]):
        architecture.check_path([names[1], names[0], *names[2:]])
