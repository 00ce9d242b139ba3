"""Everything for one card, in under nine minutes: the tests marked ``gpu``, then sampling, training steps, memory,
checkpoints and precision at Qwen2.5-0.5B's and 1.5B's shapes with random weights.

    python -m benchmarks.gpu [PART ...] [--list] [--out gpu.json] [--seconds 520]
    python -m benchmarks.gpu --device cpu --shape tiny      # the same code where there is no GPU

Each part is a process of its own with a time limit, so that one that hangs or fails costs the others nothing. It needs
no network and no pip: what needs a package that is missing, such as pytest, is skipped and says so. Writes ``gpu.json``
and prints rows for docs/results.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

import torch
import transformers

from benchmarks.flops import SHAPES
from benchmarks.gpu_parts import CARD, PARTS, TOY, Case, Figures


def said(*line: str) -> str:
    """The output of a command; "unknown" where it is not there or fails."""
    if shutil.which(line[0]) is None:
        return "unknown"
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    return (done.stdout.strip().splitlines() or ["unknown"])[0] if done.returncode == 0 else "unknown"


def machine(device: str) -> dict[str, str]:
    found = {"device": platform.processor() or platform.machine()}
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
        driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found = {"device": torch.cuda.get_device_name(), "memory": f"{memory / 2**30:.0f} GiB", "driver": driver}
    return found | {
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": said("git", "rev-parse", "HEAD"),
    }


def limited(line: Sequence[str], limit: float) -> tuple[int, str, str] | None:
    """``(exit code, output, errors)`` of a command; None where it took longer than ``limit`` seconds. It is then killed
    with all that it started, which would keep the card busy."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        line,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and so has all that it started
                os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, output, errors


def isolated(name: str, args: argparse.Namespace, limit: float) -> Figures:
    """A part in a process of its own."""
    line = [sys.executable, "-m", "benchmarks.gpu", "--inside", name, "--device", args.device]
    line += ["--shape", args.shape] if args.shape else []
    done = limited(line, limit)
    if done is None:
        return {"failed": f"more than {limit:.0f} s"}
    code, output, errors = done
    if errors:
        print(f"{name}:\n{errors[-8000:]}", file=sys.stderr, flush=True)
    if code:
        return {"failed": (errors.strip().splitlines() or [f"exit code {code}, no output"])[-1][:300]}
    found: Figures = json.loads(output.strip().splitlines()[-1])
    return found


def shown(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="parts to run; all unless given")
    parser.add_argument("--list", action="store_true", help="list the parts")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="in place of the shape of each part")
    parser.add_argument("--seconds", type=float, default=520.0, help="for all parts; what does not fit is left out")
    parser.add_argument("--inside", choices=tuple(PARTS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        part = PARTS[args.inside]
        case = Case(args.device, args.shape or part.shape, CARD if args.device == "cuda" else TOY)
        print(json.dumps(part.run(case)))
        return 0
    if args.list:
        print("\n".join(f"{name:20} at most {part.limit} s" for name, part in PARTS.items()))
        return 0
    if unknown := [name for name in args.parts if name not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}; --list shows them")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --shape tiny runs the same code")
    started, found = time.monotonic(), {"machine": machine(args.device), "parts": {}}
    print(f"{found['machine']}\n\n| part | figures | s |\n|---|---|---|", flush=True)
    for name in args.parts or PARTS:
        left, begun = args.seconds - (time.monotonic() - started), time.monotonic()
        figures: Figures = {"failed": "no time left"}
        if left > 15:
            figures = isolated(name, args, min(left, PARTS[name].limit))
        found["parts"][name] = figures
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        row = ", ".join(f"{key} {shown(value)}" for key, value in figures.items())
        print(f"| {name} | {row} | {time.monotonic() - begun:.0f} |", flush=True)
    return int(any("failed" in one or one.get("exit code", 0) for one in found["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
