"""A real Jupyter kernel, driven as a notebook drives it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.manager import KernelManager

PATIENCE = 300
"""Seconds after which a kernel that says nothing has failed; machines may be busy."""


@dataclass
class Kernel:
    manager: KernelManager
    client: BlockingKernelClient

    def run(self, code: str) -> list[dict[str, Any]]:
        """What the cell puts out, in order; drawings over an earlier output take its place."""
        return self.outputs(self.client.execute(code))

    def outputs(self, request: str) -> list[dict[str, Any]]:
        """The outputs of the cell that began with ``request``, once it has ended."""
        found: list[dict[str, Any]] = []
        while True:
            message = self.client.get_iopub_msg(timeout=PATIENCE)
            kind, content = message["msg_type"], message["content"]
            if message["parent_header"].get("msg_id") != request:
                continue
            if kind == "status" and content["execution_state"] == "idle":
                return found
            if kind == "update_display_data":
                place = content["transient"]["display_id"]
                found = [
                    {**one, "data": content["data"], "drawings": one["drawings"] + 1}
                    if one.get("transient", {}).get("display_id") == place
                    else one
                    for one in found
                ]
            elif kind in ("display_data", "execute_result", "stream", "error"):
                found.append({"kind": kind, "drawings": 1, **content})

    def interrupt_once(self, file: Path) -> None:
        """Press the interrupt button when the cell has written ``file``."""
        limit = time.monotonic() + PATIENCE
        while not file.exists():
            assert time.monotonic() < limit, f"{file} was not written"
            time.sleep(0.01)
        self.manager.interrupt_kernel()


@contextlib.contextmanager
def kernel(directory: Path) -> Iterator[Kernel]:
    """A kernel of this Python, whose cells run in ``directory``."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(directory))
    client = manager.blocking_client()
    try:
        client.start_channels()
        client.wait_for_ready(timeout=PATIENCE)
        yield Kernel(manager, client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()


def printed(outputs: list[dict[str, Any]]) -> str:
    """What was written to the streams."""
    return "".join(one["text"] for one in outputs if one["kind"] == "stream")


def errors(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in outputs if one["kind"] == "error"]
