"""The virtual environments of the peers, separate from tether's.

    python -m benchmarks.peers setup [--system-torch] [--only 1.16.0]

Makes ``.peers/trl-1.16`` (GRPOTrainer, RewardTrainer, transformers' own generation; RewardBench's code without what it
needs for other models) and ``.peers/trl-1.12`` (the last PPOTrainer). torch is installed first, in the version that
constraints.txt pins, and kept; --system-torch uses the torch of the current interpreter instead, as on a GPU image that
has its own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRL = ("1.16.0", "1.12.0")
REWARDBENCH = "rewardbench==0.1.4"


def pinned(package: str) -> str:
    """The line of constraints.txt for ``package``."""
    lines = (ROOT / "constraints.txt").read_text().split()
    return next(line for line in lines if line.startswith(f"{package}=="))


def setup(version: str, *, system_torch: bool) -> None:
    """One environment: torch, then TRL with tether's version of transformers, without another torch."""
    folder = ROOT / ".peers" / f"trl-{version.rpartition('.')[0]}"
    site = ["--system-site-packages"] if system_torch else []
    subprocess.run([sys.executable, "-m", "venv", *site, str(folder)], check=True)
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    torch = f"torch=={importlib.metadata.version('torch')}" if system_torch else pinned("torch")
    if not system_torch:
        subprocess.run([*install, torch], check=True)
    held = folder / "constraints.txt"
    held.write_text(f"{torch}\n{pinned('transformers')}\n")
    subprocess.run([*install, "--constraint", str(held), f"trl=={version}", "transformers", "numpy"], check=True)
    if version == TRL[0]:
        subprocess.run([*install, "--no-deps", REWARDBENCH], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("setup",))
    parser.add_argument("--system-torch", action="store_true")
    parser.add_argument("--only", choices=TRL, help="one of the environments; both unless given")
    args = parser.parse_args()
    for version in [args.only] if args.only else TRL:
        setup(version, system_torch=args.system_torch)


if __name__ == "__main__":
    main()
