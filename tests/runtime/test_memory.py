"""The memory of the machine and of the process, as the kernel's files have it."""

from __future__ import annotations

import mmap
import os

import pytest
import torch

from tether.runtime import memory
from tether.runtime.device import peak_resident_bytes

CPU = torch.device("cpu")


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """Files of the kernel, by name."""
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "cgroup")
    (tmp_path / "cgroup" / "memory").mkdir(parents=True)
    monkeypatch.setattr(memory, "physical_bytes", lambda: 2**40)

    def write(**texts):
        for name, text in texts.items():
            (tmp_path / name.replace("__", "/").replace("_DOT_", ".")).write_text(text)

    return write


def test_what_is_available(kernel):
    assert memory.available_bytes(CPU) is None
    kernel(meminfo="MemTotal:  9000 kB\nMemAvailable:    5000 kB\n")
    assert memory.available_bytes(CPU) == 5000 * 1024


def test_a_container_has_less(kernel):
    kernel(meminfo="MemAvailable:    5000 kB\n")
    kernel(cgroup__memory_DOT_max="max\n", cgroup__memory_DOT_current="1000\n")
    assert memory.available_bytes(CPU) == 5000 * 1024
    kernel(cgroup__memory_DOT_max="3000000\n")
    assert memory.available_bytes(CPU) == 2999000


def test_a_container_of_version_1(kernel):
    kernel(meminfo="MemAvailable:    5000 kB\n")
    kernel(cgroup__memory__memory_DOT_limit_in_bytes=f"{2**63 - 1}\n")  # none
    kernel(cgroup__memory__memory_DOT_usage_in_bytes="1000\n")
    assert memory.available_bytes(CPU) == 5000 * 1024
    kernel(cgroup__memory__memory_DOT_limit_in_bytes="2000\n")
    assert memory.available_bytes(CPU) == 1000


def test_what_the_process_has(kernel):
    assert memory.resident_bytes() == peak_resident_bytes()
    kernel(status="Name:\tpython\nVmHWM:\t  900 kB\nVmRSS:\t   700 kB\n")
    assert memory.resident_bytes() == 700 * 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs the files of Linux")
def test_this_process():
    before = memory.resident_bytes()
    with mmap.mmap(-1, 120_000_000) as held:  # from the kernel itself: an allocator may have kept as much
        held.write(b"\1" * len(held))
        assert memory.resident_bytes() - before > 100_000_000
