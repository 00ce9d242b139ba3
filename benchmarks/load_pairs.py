"""How long reading and tokenising preference pairs takes, and how much memory, on one thread.

    python -m benchmarks.load_pairs [--pairs 100000] [--model base]

The pairs are text: prompts of 60 words, sides of 40, drawn from the prompts that come with the program, 725 bytes of
JSON per row. Then a single row of 50 MB is offered, which must be refused without being tokenised. Memory is the peak
of the whole process, of which the imports are stated.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from importlib import resources
from pathlib import Path

CONTEXT = 4096


def write_pairs(path: Path, count: int, *, seed: int = 0) -> None:
    """``count`` rows with prompt, chosen and rejected."""
    prompts = (resources.files("tether") / "assets" / "prompts_train.jsonl").read_text(encoding="utf-8")
    words = " ".join(json.loads(line)["prompt"] for line in prompts.splitlines()).split()
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            prompt, chosen, rejected = (" ".join(draw.choices(words, k=k)) for k in (60, 40, 40))
            print(json.dumps({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}), file=file)


def peak_megabytes() -> float:
    """The largest resident size of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--model", default="base", help="whose tokenizer is used")
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    from tether.data.records import load_pairs
    from tether.errors import DataError
    from tether.models.loading import load_tokenizer

    tokenizer = load_tokenizer(options.model)
    imports = peak_megabytes()
    with tempfile.TemporaryDirectory() as directory:
        path, long = Path(directory) / "pairs.jsonl", Path(directory) / "long.jsonl"
        write_pairs(path, options.pairs)
        started, used = time.perf_counter(), time.process_time()
        pairs = load_pairs(str(path), tokenizer, context=CONTEXT)
        seconds, used = time.perf_counter() - started, time.process_time() - used
        tokens = sum(len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
        print(f"{len(pairs)} pairs, {tokens / len(pairs):.0f} tokens each: {seconds:.1f} s, {used:.1f} s of the CPU")
        print(f"peak memory {peak_megabytes():.0f} MB, of which {imports:.0f} MB are the imports")

        long.write_text(json.dumps({"chosen": "lorem ipsum " * (50_000_000 // 12), "rejected": "a"}), encoding="utf-8")
        started = time.perf_counter()
        try:
            load_pairs(str(long), tokenizer, context=CONTEXT)
        except DataError as error:
            print(f"a row of 50 MB: refused in {time.perf_counter() - started:.2f} s ({error})")


if __name__ == "__main__":
    main()
