"""transformers' side of the rollout benchmark.

    python -m benchmarks.peer_generate generate|generate_batch SPEC.json

``generate`` is called as TRL's GRPOTrainer calls it: prompts repeated G times and padded on the left, the default
cache, no compilation. ``generate_batch`` is continuous batching, called as TRL calls it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchmarks.worker import Spec, serve


def load(spec: Spec):
    model = (
        AutoModelForCausalLM.from_pretrained(
            spec.model, dtype=getattr(torch, spec.dtype), trust_remote_code=False, use_safetensors=True
        )
        .to(spec.device)
        .eval()
    )
    tokenizer = AutoTokenizer.from_pretrained(spec.model, trust_remote_code=False)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in spec.rows("prompts")]
    return model, tokenizer, [prompt for prompt in prompts for _ in range(spec.group_size)]


def settings(spec: Spec, tokenizer, **lengths: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=spec.max_new_tokens,
        do_sample=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        disable_compile=True,
        **lengths,
    )


def generate(spec: Spec) -> Callable[[], None]:
    model, tokenizer, prompts = load(spec)
    config = settings(spec, tokenizer, eos_token_id=tokenizer.eos_token_id, min_new_tokens=spec.max_new_tokens)

    def step() -> None:
        width = max(map(len, prompts))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts], device=spec.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=spec.device)
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        completions = out[:, width:].tolist()
        if [len(c) for c in completions] != [spec.max_new_tokens] * len(prompts):
            raise RuntimeError("completions of the wrong length")

    return step


def generate_batch(spec: Spec) -> Callable[[], None]:
    model, tokenizer, prompts = load(spec)
    config = settings(spec, tokenizer, eos_token_id=-1)  # an id that is never drawn

    def step() -> None:
        with torch.no_grad():
            out = model.generate_batch(prompts, generation_config=config, progress_bar=False)
        whole = sum(len(o.generated_tokens) == spec.max_new_tokens for o in out.values())
        if whole != len(prompts):  # failed requests raise nothing
            errors = {o.error for o in out.values() if o.error}
            raise RuntimeError(f"{whole} of {len(prompts)} requests came back whole {errors or ''}")

    return step


if __name__ == "__main__":
    chosen = {"generate": generate, "generate_batch": generate_batch}[sys.argv[1]]
    its_spec = Spec.read(sys.argv[2])
    serve(chosen(its_spec), torch.cuda.synchronize if its_spec.device == "cuda" else lambda: None)
