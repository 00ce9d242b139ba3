"""How much memory there is on a device, and how much of it this process has."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from tether.runtime.device import peak_resident_bytes

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
STATUS = Path("/proc/self/status")
KIB = 1024


def resident_bytes() -> int:
    """What this process has in RAM now; where the system does not say, which all but Linux do not, the most it had."""
    found = _kib(STATUS, "VmRSS")
    return peak_resident_bytes() if found is None else found


def available_bytes(device: torch.device) -> int | None:
    """What can still be allocated on ``device`` by this process, less what a container's limit forbids; None where the
    system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    found = [left for left in (_kib(MEMINFO, "MemAvailable"), _left_in_container()) if left is not None]
    return min(found, default=None)


def _kib(file: Path, name: str) -> int | None:
    """The figure ``name: N kB`` of a file of the kernel, in bytes."""
    if not file.is_file():
        return None
    for line in file.read_text(encoding="ascii", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * KIB
    return None


def _left_in_container() -> int | None:
    """What the limit of this process's control group (version 2, or 1) leaves; None without one."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        if (CGROUP / limit).is_file() and (CGROUP / used).is_file():
            stated = (CGROUP / limit).read_text(encoding="ascii").strip()
            if stated.isdigit() and int(stated) < physical_bytes():
                return int(stated) - int((CGROUP / used).read_text(encoding="ascii"))
    return None


def physical_bytes() -> int:
    """RAM of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
