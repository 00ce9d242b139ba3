"""Options of known recipes, by name: ``tether grpo --preset NAME``. A file (``--config``) and flags override them.

Each names what it is taken from. Sizes that recipes give for several devices are those of one: the pairs or completions
of a step, whatever the micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The options of one recipe."""

    command: str
    summary: str
    source: str
    options: Mapping[str, Any]


GSM8K = {
    "prompts": "openai/gsm8k:main:train",
    "eval_prompts": "openai/gsm8k:main:test[:256]",
    "columns": ("prompt=question",),
    "conversation": True,
    "system": "Reason step by step, and end with #### and the answer as a number.",
    "reward": ("exact_answer",),
    "group_size": 8,
    "prompts_per_step": 16,
    "steps": 450,
    "kl_coef": 0.04,
    "kl_units": "advantage",
    "max_new_tokens": 400,
    "learning_rate": 1e-6,
    "warmup_steps": 20,
    "dtype": "bfloat16",
    "eval_every": 50,
    "eval_group_size": 1,
}
GSM8K_SOURCE = "the hyperparameters of DeepSeekMath (arXiv 2402.03300) but for the group, which has 64 there"
LORA = {"lora_rank": 32, "learning_rate": 1e-5}
TLDR = "Huang et al. 2024, arXiv 2403.17031, 1B"

PAIRS = {"epochs": 1.0, "batch_size": 64, "overlong": "drop", "on_bad_rows": "skip"}
JUDGE = {**PAIRS, "eval_share": 0.02, "learning_rate": 1e-5}
ZEPHYR = {
    "model": "Qwen/Qwen2.5-0.5B-Instruct",
    "pairs": "trl-lib/ultrafeedback_binarized",
    "eval_pairs": "trl-lib/ultrafeedback_binarized:test",
    **PAIRS,
    "beta": 0.1,
    "learning_rate": 5e-7,
}

PRESETS: Mapping[str, Preset] = {
    "qwen2.5-0.5b-gsm8k-grpo": Preset(
        command="grpo",
        summary="Qwen2.5-0.5B-Instruct on the grade-school problems of GSM8K",
        source=GSM8K_SOURCE,
        options={"model": "Qwen/Qwen2.5-0.5B-Instruct", **GSM8K},
    ),
    "qwen2.5-1.5b-gsm8k-grpo": Preset(
        command="grpo",
        summary="Qwen2.5-1.5B-Instruct on GSM8K",
        source=GSM8K_SOURCE,
        options={"model": "Qwen/Qwen2.5-1.5B-Instruct", **GSM8K},
    ),
    "qwen2.5-1.5b-gsm8k-grpo-24gb": Preset(
        command="grpo",
        summary="the same with an adapter, for a card of 24 GB",
        source=f"{GSM8K_SOURCE}; LoRA of rank 32 at ten times the learning rate",
        options={"model": "Qwen/Qwen2.5-1.5B-Instruct", **GSM8K, **LORA, "checkpoint_activations": True},
    ),
    "qwen2.5-0.5b-gsm8k-grpo-8gb": Preset(
        command="grpo",
        summary="Qwen2.5-0.5B-Instruct on GSM8K with an adapter, for a card of 8 GB",
        source=f"{GSM8K_SOURCE}; LoRA of rank 32 at ten times the learning rate",
        options={
            "model": "Qwen/Qwen2.5-0.5B-Instruct",
            **GSM8K,
            **LORA,
            "checkpoint_activations": True,
            "micro_batch_tokens": 4096,
        },
    ),
    "gpt2-sentiment-ppo": Preset(
        command="ppo",
        summary="GPT-2 to positive sentiment; give --prompts, such as the first words of film reviews",
        source="after the sentiment example of early TRL (rate, epochs, adaptive KL), with VADER as the reward",
        options={
            "model": "gpt2",
            "reward": ("sentiment",),
            "prompts_per_step": 256,
            "group_size": 1,
            "steps": 100,
            "max_new_tokens": 16,
            "learning_rate": 1.41e-5,
            "epochs_per_step": 4,
            "minibatches": 2,
            "kl_coef": 0.2,
            "adaptive_kl_target": 6.0,
            "adaptive_kl_horizon": 10000,
            "value_coef": 0.1,
        },
    ),
    "pythia-1b-tldr-reward": Preset(
        command="reward",
        summary="Pythia-1B as a judge of summaries",
        source=TLDR,
        options={
            "model": "EleutherAI/pythia-1b-deduped",
            "pairs": "trl-lib/tldr-preference",
            "eval_pairs": "trl-lib/tldr-preference:validation",
            "test_share": 0.0,
            "epochs": 1.0,
            "batch_size": 64,
            "learning_rate": 3e-6,
            "lr_schedule": "cosine",
            "warmup_steps": 0,
            "weight_decay": 0.01,
            "adam_eps": 1e-5,
            "overlong": "drop",
        },
    ),
    "pythia-1b-tldr-ppo": Preset(
        command="ppo",
        summary="Pythia-1B, fine-tuned on summaries, by PPO; give --model and --reward, its own judge",
        source=TLDR,
        options={
            "prompts": "trl-lib/tldr",
            "overlong": "drop",
            "prompts_per_step": 512,
            "group_size": 1,
            "steps": 1953,
            "max_new_tokens": 53,
            "temperature": 0.7,
            "epochs_per_step": 4,
            "minibatches": 1,
            "learning_rate": 3e-6,
            "lr_schedule": "linear",
            "weight_decay": 0.01,
            "adam_beta2": 0.999,
            "kl_coef": 0.05,
            "lam": 0.95,
            "value_coef": 0.1,
            "critic_trunk": True,
            "missing_eos_penalty": 1.0,
        },
    ),
    "hh-reward": Preset(
        command="reward",
        summary="Qwen2.5-0.5B as a judge of helpful and harmless dialogue",
        source="Bai et al. 2022, arXiv 2204.05862: one epoch; the rate is the usual one for a model of this size",
        options={
            "model": "Qwen/Qwen2.5-0.5B",
            "pairs": "Anthropic/hh-rlhf",
            "test_pairs": "Anthropic/hh-rlhf:test",
            **JUDGE,
        },
    ),
    "ultrafeedback-reward": Preset(
        command="reward",
        summary="Qwen2.5-0.5B-Instruct as a judge of instructions",
        source="the reward example of TRL: one epoch at 1e-5",
        options={
            "model": "Qwen/Qwen2.5-0.5B-Instruct",
            "pairs": "trl-lib/ultrafeedback_binarized",
            "test_pairs": "trl-lib/ultrafeedback_binarized:test",
            **JUDGE,
        },
    ),
    "ultrafeedback-dpo": Preset(
        command="dpo",
        summary="Qwen2.5-0.5B-Instruct on the pairs of UltraFeedback",
        source="Zephyr, Tunstall et al. 2023, arXiv 2310.16944: beta 0.1, 5e-7, one epoch",
        options=ZEPHYR,
    ),
    "ultrafeedback-dpo-8gb": Preset(
        command="dpo",
        summary="the same with an adapter, for a card of 8 GB",
        source="Zephyr, arXiv 2310.16944; LoRA of rank 16 at ten times the learning rate",
        options={
            **ZEPHYR,
            "learning_rate": 5e-6,
            "lora_rank": 16,
            "dtype": "bfloat16",
            "checkpoint_activations": True,
            "micro_batch_tokens": 4096,
        },
    ),
}


def presets_of(command: str) -> dict[str, Preset]:
    """The presets of a command."""
    return {name: preset for name, preset in PRESETS.items() if preset.command == command}
