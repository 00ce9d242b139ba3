"""Pretrain the embedded base model on the texts that ``scripts/corpus.py`` wrote.

    python scripts/pretrain.py --corpus corpus/ --out base/ --minutes 60

A Llama-layout model reads one text at a time, ``<s> text </s>`` from position 0, exactly as in later use: rows of one
batch have nearly the same length (buckets of 16 tokens), so no text attends to another and there is little padding.
Matrices of the blocks are trained by Muon (momentum, orthogonalised by five Newton-Schulz steps; Jordan et al. 2024),
the tied embedding and the norms by AdamW; both learning rates warm up and then decay linearly to zero over the time
of ``--minutes``, so the result depends on the machine's speed as well as on the seed. Weights, activations and the loss
are float32; only the operands of the linear layers' matrix products are rounded to bfloat16, which trains faster than
float32 and than autocast on two cores with AVX512-BF16 (7,000 tokens per second against 1,700 to 4,300 and 2,400, on a
busy machine).

The model is written once, at the end, in bfloat16 (every 500 steps a copy goes to ``OUT/partial``). Its quality is
measured in bits per character on the heldout paragraphs: the negative log2-likelihood of the text and its ``</s>``
given ``<s>``, summed over texts, divided by their characters, with the rounded weights.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tether.models.linear import round_matmuls

BOS, EOS, PAD = 0, 1, 2
BUCKET = 16
CONTEXT = 512


def load_texts(path: Path, tokenizer: Tokenizer, every: int = 1) -> tuple[list[list[int]], int]:
    """Token ids ``<s> text </s>`` of each text, and the number of characters."""
    rows = [json.loads(line)["text"] for line in path.open(encoding="utf-8")][::every]
    ids = [[BOS, *encoding.ids, EOS] for encoding in tokenizer.encode_batch(rows, add_special_tokens=False)]
    return [row for row in ids if len(row) <= CONTEXT], sum(map(len, rows))


def batches(texts: list[list[int]], tokens_per_batch: int, rng: random.Random) -> Iterator[torch.Tensor]:
    """One epoch: length buckets, shuffled within and across buckets; every batch of a bucket has one shape."""
    buckets: dict[int, list[list[int]]] = {}
    for text in texts:
        buckets.setdefault(math.ceil((len(text) - 1) / BUCKET) * BUCKET + 1, []).append(text)
    plan = []
    for width, rows in buckets.items():
        rng.shuffle(rows)
        height = max(1, tokens_per_batch // width)
        plan += [(width, rows[i : i + height]) for i in range(0, len(rows) - height + 1, height)]
    rng.shuffle(plan)
    for width, rows in plan:
        yield torch.tensor([row + [PAD] * (width - len(row)) for row in rows])


def token_loss(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood over the real tokens after ``<s>``; ``batch`` is [B, T] padded on the right."""
    logits = model(input_ids=batch[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=PAD)


@torch.no_grad()
def bits_per_character(model: LlamaForCausalLM, texts: list[list[int]], characters: int) -> float:
    total = 0.0
    texts = sorted(texts, key=len)
    for i in range(0, len(texts), 32):
        rows = texts[i : i + 32]
        batch = torch.tensor([row + [PAD] * (len(rows[-1]) - len(row)) for row in rows])
        total += token_loss(model, batch).item() * sum(len(row) - 1 for row in rows)
    return total / math.log(2) / characters


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Five quintic Newton-Schulz steps in bfloat16 towards U V^T of each matrix; ``matrices`` is [N, rows, columns]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (matrices.mT if matrices.size(1) > matrices.size(2) else matrices).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if matrices.size(1) > matrices.size(2) else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon, all matrices of one shape together (``torch.optim.Muon`` orthogonalises them one by one)."""

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[torch.nn.Parameter, torch.Tensor]]] = {}
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                by_shape.setdefault(p.shape, []).append((p, p.grad.lerp(buffer, group["momentum"])))
            for shape, pairs in by_shape.items():
                updates = orthogonalise(torch.stack([u for _, u in pairs]))
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.add_(update, alpha=-group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5)


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=CONTEXT
    )
    rounded = LlamaForCausalLM(model.config).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.save_pretrained(out)
    fast.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="start from the weights of an earlier run instead of random ones")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--tokens-per-step", type=int, default=8192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=288)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--mlp", type=int, default=768)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=0.004)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    tokenizer = Tokenizer.from_file(str(args.corpus / "tokenizer.json"))
    train, _ = load_texts(args.corpus / "train.jsonl", tokenizer)
    sample, sample_characters = load_texts(args.corpus / "heldout.jsonl", tokenizer, every=20)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=args.width,
            intermediate_size=args.mlp,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )
    if args.init:
        earlier = LlamaForCausalLM.from_pretrained(
            args.init, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        )
        model.load_state_dict(earlier.state_dict())
    model.config.use_cache = False
    round_matmuls(model)
    loss_of = torch.compile(token_loss, dynamic=True)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [
        Muon(matrices, lr=args.muon_lr),
        torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_lrs = [args.muon_lr, args.adam_lr]
    rng = random.Random(args.seed)
    start, seen, step, running, share = time.monotonic(), 0, 0, 0.0, 0.0
    while share < 1:
        for batch in batches(train, args.tokens_per_step, rng):
            share = (time.monotonic() - start) / (60 * args.minutes)
            if share >= 1:
                break
            scale = min((step + 1) / args.warmup_steps, 1 - share)
            for optimizer, lr in zip(optimizers, base_lrs, strict=True):
                optimizer.param_groups[0]["lr"] = lr * scale
            loss = loss_of(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            seen += int((batch[:, 1:] != PAD).sum())
            running = 0.95 * running + 0.05 * loss.item() if step else loss.item()
            step += 1
            if step % 50 == 0:
                bpc = bits_per_character(model, sample, sample_characters)
                rate = seen / (time.monotonic() - start)
                figures = f"loss {running:.4f}, heldout {bpc:.4f} bits per character, {rate:.0f} tokens/s"
                print(f"step {step} ({share:.0%}), {seen} tokens: {figures}", flush=True)
            if step % 500 == 0:
                save(model, tokenizer, args.out / "partial")

    model.config.use_cache = True
    save(model, tokenizer, args.out)
    shutil.rmtree(args.out / "partial", ignore_errors=True)
    shipped = LlamaForCausalLM.from_pretrained(
        args.out, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    heldout, characters = load_texts(args.corpus / "heldout.jsonl", tokenizer)
    report = {
        "parameters": sum(p.numel() for p in shipped.parameters()),
        "continued": args.init is not None,
        "steps": step,
        "tokens": seen,
        "seconds": round(time.monotonic() - start),
        "heldout_bits_per_character": bits_per_character(shipped, heldout, characters),
        "arguments": {k: v for k, v in vars(args).items() if k not in ("corpus", "out", "init")},
    }
    (args.out / "pretraining.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
