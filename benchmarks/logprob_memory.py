"""Peak memory of the log-prob pass, forward and backward: tether's chunks against the full logits.

    python -m benchmarks.logprob_memory [--tokens 4096] [--width 256] [--vocabulary 151936]

The weights, their gradient and the hidden states exist before and do not count; the gradient that the pass adds to the
weights' does.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.live_bytes import peak_bytes
from tether.ops.logprobs import chunked_logprobs, token_entropy, token_logprobs

Pass = Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], tuple[Tensor, Tensor]]


def full(hidden: Tensor, ids: Tensor, project: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probs, and entropies without gradient, from all logits at once."""
    logits = project(hidden)
    return token_logprobs(logits, ids), token_entropy(logits.detach())


def chunked(hidden: Tensor, ids: Tensor, project: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The same as tether computes them in training."""
    logp, entropy = chunked_logprobs(hidden, ids, project, entropy=True)
    return logp, entropy


def measure(compute: Pass, *, tokens: int, width: int, vocabulary: int, device: str) -> dict[str, float]:
    """Peak bytes and seconds of a forward and backward pass, measured separately."""
    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=False, device=device)
    hidden = torch.randn(tokens, width, device=device, requires_grad=True)
    ids = torch.randint(vocabulary, (tokens,), device=device)
    head.weight.grad, hidden.grad = torch.zeros_like(head.weight), torch.zeros_like(hidden)

    def run() -> None:
        logp, _ = compute(hidden, ids, head)
        logp.sum().backward()

    run()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"peak_mib": peak_bytes(run, device) / 2**20, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--json", type=Path, help="write all results to this file")
    args = parser.parse_args()
    size = {"tokens": args.tokens, "width": args.width, "vocabulary": args.vocabulary}
    found = {f.__name__: measure(f, **size, device=args.device) for f in (chunked, full)}
    logits, weights = (4 * rows * args.vocabulary / 2**20 for rows in (args.tokens, args.width))
    print(f"log-prob pass, {size}: all logits are {logits:.0f} MiB, the weights {weights:.0f} MiB")
    for name, figures in found.items():
        print(f"  {name:8} peak {figures['peak_mib']:7.0f} MiB   {figures['seconds']:6.2f} s")
    print(f"  {found['full']['peak_mib'] / found['chunked']['peak_mib']:.1f} times less memory")
    if args.json:
        args.json.write_text(json.dumps({**size, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
