"""CUDA graphs of decoding steps: which shapes are captured, and the step that captures and replays them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from tether.generation.cache import Pool, Seating, Shape
from tether.models.experts import routers

STRIDE = 8
"""Decoding steps on CUDA between two looks of the host at the tokens."""
REACH = 256
"""A row's own keys are given to attention in multiples of this on CUDA."""


def graphed(model: nn.Module, device: torch.device) -> bool:
    """Whether decoding steps are captured as graphs: on CUDA, but not those of a mixture of experts, whose products
    have shapes that depend on which experts the tokens get."""
    return device.type == "cuda" and not routers(model)


def power_of_two(n: int) -> int:
    """The least power of two that is ``n`` or more."""
    return 1 << (n - 1).bit_length()


def graph_shape(needed: Shape, prefixes: Pool, own: Pool) -> Shape:
    """The least shape that holds ``needed``, of the few that are captured: there is one graph per shape."""
    return Shape(
        rows=min(power_of_two(needed.rows), own.places),
        slots=prefixes.places,
        members=power_of_two(needed.members),
        prefix_reach=prefixes.capacity,
        own_reach=min(-(-needed.own_reach // REACH) * REACH, own.capacity),
    )


class GraphedStep:
    """A decoding step on CUDA as one graph per shape of its seating.

    A shape's first steps run as they are, on a stream of their own, which is the warm-up that capture asks for; then
    the step is captured, once, and replayed. Capture runs nothing, so no step is lost or done twice.
    """

    WARM_UP = 2

    def __init__(self, step: Callable[[Seating], None]) -> None:
        self.step = step
        self.stream = torch.cuda.Stream()
        self.seatings: dict[Shape, Seating] = {}
        self.runs: Counter[Shape] = Counter()
        self.graphs: dict[Shape, torch.cuda.CUDAGraph] = {}

    def __call__(self, seating: Seating) -> None:
        shape = seating.shape
        static = self.seatings.setdefault(shape, seating)
        if static is not seating:  # a graph reads the tensors that it was captured with
            for target, source in zip(static.tensors(), seating.tensors(), strict=True):
                target.copy_(source)
        if shape in self.graphs:
            self.graphs[shape].replay()
            return
        self.runs[shape] += 1
        if self.runs[shape] > self.WARM_UP:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step(static)
            self.graphs[shape] = graph
            graph.replay()
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.step(static)
        torch.cuda.current_stream().wait_stream(self.stream)
