"""What user code sets for the whole process, kept apart from training.

A reward file may change the working directory, seed a generator, switch gradients off or choose a default dtype. Those
settings stay its own: they hold while its code runs, and training has what it had.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Setting:
    """Something that holds for the whole process; values of ``get`` compare with ``==``."""

    get: Callable[[], Any]
    put: Callable[[Any], None]


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _enter(directory: str | None) -> None:
    if directory is not None:
        os.chdir(directory)


def _numpy_state() -> Any:
    if "numpy" not in sys.modules:
        return None
    kind, words, *rest = sys.modules["numpy"].random.get_state()
    return kind, words.tobytes(), *rest


def _set_numpy_state(state: Any) -> None:
    if state is not None:
        numpy = sys.modules["numpy"]
        kind, words, *rest = state
        numpy.random.set_state((kind, numpy.frombuffer(words, dtype=numpy.uint32), *rest))


def _torch_states() -> list[bytes]:
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]
    return [state.numpy().tobytes() for state in states]


def _set_torch_states(states: list[bytes]) -> None:
    host, *devices = [torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in states]
    torch.set_rng_state(host)
    for index, state in enumerate(devices):
        torch.cuda.set_rng_state(state, index)


def _determinism() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _set_gradients(on: bool) -> None:
    torch.set_grad_enabled(on)


def _set_default_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)


SETTINGS: dict[str, Setting] = {
    "working directory": Setting(_working_directory, _enter),
    "default dtype": Setting(torch.get_default_dtype, torch.set_default_dtype),
    "default device": Setting(torch.get_default_device, _set_default_device),
    "gradients": Setting(torch.is_grad_enabled, _set_gradients),
    "threads": Setting(torch.get_num_threads, torch.set_num_threads),
    "determinism": Setting(_determinism, lambda both: torch.use_deterministic_algorithms(both[0], warn_only=both[1])),
    "matmul precision": Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "random": Setting(random.getstate, random.setstate),
    "numpy.random": Setting(_numpy_state, _set_numpy_state),
    "torch.random": Setting(_torch_states, _set_torch_states),
}
"""What training must not share with a reward file."""
HANDLED = (signal.SIGINT, signal.SIGTERM)
"""Signals that ask a run to stop. A library that a reward uses may handle them from then on (Ray does)."""


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """After the block, which must run in the main thread to change any, :data:`HANDLED` are handled as before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in HANDLED}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


@dataclass
class Apart:
    """The settings of one reward file that differ from training's."""

    own: dict[str, Any] = field(default_factory=dict)
    """Name in :data:`SETTINGS` to value."""

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Within the block the file's settings hold; what it changes becomes one of them, and is undone after it."""
        before = {name: setting.get() for name, setting in SETTINGS.items()}
        entered = before | self.own
        for name, value in self.own.items():
            if value != before[name]:
                SETTINGS[name].put(value)
        try:
            with handlers_kept():
                yield
        finally:
            for name, setting in SETTINGS.items():
                after = setting.get()
                if after != entered[name]:
                    self.own[name] = after
                if after != before[name]:
                    setting.put(before[name])
