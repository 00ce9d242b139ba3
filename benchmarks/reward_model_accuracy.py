"""Held-out accuracy of ``tether reward`` against a bag of words, on the same split of real preference pairs.

    python -m benchmarks.reward_model_accuracy --data DIR --task polarity [--model base] [--seeds 3]

``polarity``: 4,000 random (positive, negative) sentences of the sentence-polarity data, 1,331 pairs held out.
``ethics``: the 13,738 training pairs of ETHICS utilitarianism, 4,808 test pairs.
``helpful``, ``harmless``: the test pairs of HH's helpful-base and harmless-base, a fifth of them held out; dialogues
beyond the model's context lose their beginning.

The bag of words is Bradley-Terry on hashed unigrams and bigrams (score = w . counts, L2 penalty chosen on a tenth of
the training pairs). The reward model chooses its stopping time on a tenth of the *training* pairs too, so that neither
side has seen the held-out pairs in any way. Both report the share of held-out pairs ranked correctly.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import itertools
import json
import random
import re
import statistics
import tempfile
import time
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tether.algorithms import reward_model
from tether.algorithms.pair_evaluation import accuracy_interval, evaluation_of
from tether.config import DataOptions, RunOptions
from tether.data.records import load_pairs
from tether.models.loading import context_length
from tether.models.reward import load_reward_model
from tether.training import reward

Pair = tuple[str, str]
BUCKETS = 2**18
PENALTIES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)


def polarity(data: Path, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """4,000 training and 1,331 held-out pairs of random positive and negative sentences."""
    with zipfile.ZipFile(data / "sentiment" / "sentence_polarity.zip") as archive:
        sides = []
        for kind in ("pos", "neg"):
            name = next(n for n in archive.namelist() if n.endswith(f"rt-polarity.{kind}"))
            lines = archive.read(name).decode("latin-1").splitlines()
            sides.append([line.strip() for line in lines if line.strip()])
    rng = random.Random(seed)
    for side in sides:
        rng.shuffle(side)
    pairs = list(zip(*sides, strict=True))
    return pairs[:4000], pairs[4000:]


def ethics(data: Path) -> tuple[list[Pair], list[Pair]]:
    """All training pairs and all test pairs; column 0 is preferred."""

    def read(name: str) -> list[Pair]:
        with (data / "ethics_util" / name).open(newline="", encoding="utf-8") as file:
            return [(row[0], row[1]) for row in csv.reader(file) if row[0].strip() != row[1].strip()]

    return read("util_train.csv"), read("util_test.csv")


def dialogues(data: Path, kind: str, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Four fifths and a fifth of HH's pairs of this kind, drawn at random."""
    with gzip.open(data / "hh_rlhf" / f"{kind}-base.test.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    pairs = [(row["chosen"], row["rejected"]) for row in rows if row["chosen"] != row["rejected"]]
    random.Random(seed).shuffle(pairs)
    return pairs[len(pairs) // 5 :], pairs[: len(pairs) // 5]


def features(text: str) -> dict[int, float]:
    """Counts of hashed unigrams and bigrams."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    counts: dict[int, float] = {}
    for gram in [*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))]:
        bucket = zlib.crc32(gram.encode()) % BUCKETS
        counts[bucket] = counts.get(bucket, 0.0) + 1.0
    return counts


@dataclass(frozen=True)
class Differences:
    """Features of the chosen side minus those of the rejected one, for N pairs."""

    buckets: Tensor  # [n] int64, pair after pair
    counts: Tensor  # [n]
    starts: Tensor  # [N] int64: where each pair's entries begin

    @staticmethod
    def of(pairs: Sequence[Pair]) -> Differences:
        buckets: list[int] = []
        counts: list[float] = []
        starts: list[int] = []
        for pair in pairs:
            starts.append(len(buckets))
            for text, sign in zip(pair, (1.0, -1.0), strict=True):
                found = features(text)
                buckets += found.keys()
                counts += [sign * count for count in found.values()]
        return Differences(torch.tensor(buckets), torch.tensor(counts), torch.tensor(starts))

    def margins(self, w: Tensor) -> Tensor:
        """w . difference of each pair, [N]; ``w`` [BUCKETS, 1]."""
        bags = F.embedding_bag(self.buckets, w, self.starts, mode="sum", per_sample_weights=self.counts)
        return bags.squeeze(1)


def fit(x: Differences, penalty: float) -> Tensor:
    """Weights that minimise mean -log sigmoid(margin) + penalty |w|^2."""
    w = torch.zeros(BUCKETS, 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=100, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -F.logsigmoid(x.margins(w)).mean() + penalty * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return w.detach()


def accuracy(x: Differences, w: Tensor) -> float:
    margins = x.margins(w)
    return float(torch.where(margins == 0, 0.5, (margins > 0).float()).mean())


def bag_of_words(train: Sequence[Pair], held_out: Sequence[Pair]) -> float:
    cut = len(train) // 10
    inner, judge = Differences.of(train[cut:]), Differences.of(train[:cut])
    best = max(PENALTIES, key=lambda penalty: accuracy(judge, fit(inner, penalty)))
    return accuracy(Differences.of(held_out), fit(Differences.of(train), best))


def write_pairs(path: Path, pairs: Sequence[Pair]) -> str:
    lines = [json.dumps({"chosen": chosen, "rejected": rejected}) + "\n" for chosen, rejected in pairs]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


@dataclass(frozen=True)
class Learned:
    """What a reward model says of the held-out pairs."""

    found: reward_model.Evaluation
    longer: Tensor
    """Tokens that the chosen side has more than the rejected one, [N]."""
    right: Tensor
    """Whether the chosen side scores higher, [N]."""

    def by_length(self) -> str:
        """The accuracy where the chosen side is longer, much longer, shorter and much shorter."""
        size = self.longer.abs().float().median()
        said = []
        for name, chosen in (
            ("longer by more than the median", self.longer > size),
            ("longer by less", (self.longer > 0) & (self.longer <= size)),
            ("shorter by less", (self.longer < 0) & (self.longer >= -size)),
            ("shorter by more", self.longer < -size),
        ):
            right = self.right[chosen].tolist()
            low, high = accuracy_interval(right, range(len(right)))
            said.append(f"{name} {statistics.mean(right):.3f} [{low:.3f}, {high:.3f}] of {len(right)}")
        return "; ".join(said)


def learned(train: Sequence[Pair], held_out: Sequence[Pair], *, model: str, seed: int) -> Learned:
    """``tether reward`` on ``train``, measured on ``held_out``."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pairs = write_pairs(root / "train.jsonl", train)
        run = RunOptions(out=str(root / "run"), seed=seed, quiet=True)
        rows = DataOptions(overlong="truncate", on_bad_rows="skip")
        reward.train(reward.Reward(model=model, pairs=pairs, test_share=0, data_options=rows, run=run))
        trained, tokenizer = load_reward_model(str(root / "run" / "model"))
        judged = load_pairs(
            write_pairs(root / "held_out.jsonl", held_out),
            tokenizer,
            context=context_length(trained),
            overlong="truncate",
            on_bad_rows="skip",
        )
        scores = reward_model.score_pairs(trained, judged, token_budget=16384)
        longer = torch.tensor([len(pair.chosen_ids) - len(pair.rejected_ids) for pair in judged])
        return Learned(evaluation_of(judged, scores), longer, (scores[0] > scores[1]).double())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", choices=("polarity", "ethics", "helpful", "harmless"), required=True)
    parser.add_argument("--model", default="base")
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    if args.task in ("helpful", "harmless"):
        train, held_out = dialogues(args.data, args.task)
    else:
        train, held_out = polarity(args.data) if args.task == "polarity" else ethics(args.data)
    print(f"{args.task}: {len(train)} training pairs, {len(held_out)} held out", flush=True)
    start = time.monotonic()
    words = bag_of_words(train, held_out)
    print(f"bag of words {words:.4f}  ({time.monotonic() - start:.0f} s)", flush=True)
    found = []
    for seed in range(args.seeds):
        start = time.monotonic()
        judge = learned(train, held_out, model=args.model, seed=seed)
        one = judge.found
        found.append(one.accuracy)
        print(
            f"tether reward, seed {seed} {one.accuracy:.4f} [{one.accuracy_low:.3f}, {one.accuracy_high:.3f}] on "
            f"{one.pairs} pairs; the longer side wins {one.longer_wins:.3f}, and is preferred in "
            f"{one.prefers_longer:.3f}  ({time.monotonic() - start:.0f} s)\n  chosen side {judge.by_length()}",
            flush=True,
        )
    print(f"median {statistics.median(found):.4f}, {statistics.median(found) - words:+.4f} against the bag of words")


if __name__ == "__main__":
    main()
