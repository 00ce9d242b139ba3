"""TRL's side of the benchmarks.

    python -m benchmarks.peer_trl grpo_step|ppo_step|reward_epoch SPEC.json

TRL's trainers own their loops, so the turns are taken in a callback: the clock runs from the end of one step to the end
of the next, data loading and the optimizer included. Logging, saving, evaluation, progress bars and gradient
checkpointing are off. The number of sequences per forward pass (``peer_rows``) is TRL's fastest of those tried.
"""

from __future__ import annotations

import sys
import tempfile

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
)

from benchmarks.worker import Spec, Turns


class TakeTurns(TrainerCallback):
    """Answers at the end of every ``steps_per_turn``-th optimizer step."""

    def __init__(self, spec: Spec) -> None:
        self.turns = Turns(torch.cuda.synchronize if spec.device == "cuda" else lambda: None)
        self.steps_per_turn = spec.steps_per_turn

    def on_train_begin(self, *_, **__):
        self.turns.wait()

    def on_step_end(self, args, state, *_, **__):  # noqa: ARG002
        if state.global_step % self.steps_per_turn == 0:
            self.turns.answer()
            self.turns.wait()


def common(spec: Spec) -> dict:
    """Training arguments that all trainers share."""
    return {
        "output_dir": tempfile.mkdtemp(prefix="trl-"),
        "use_cpu": spec.device == "cpu",
        "bf16": spec.dtype == "bfloat16",
        "gradient_checkpointing": False,
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "logging_strategy": "no",
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": spec.device == "cuda",
        "seed": 0,
    }


def sevens(completion_ids, **_) -> list[float]:
    """The same reward as on tether's side."""
    return [sum(i % 7 == 0 for i in ids) / len(ids) for ids in completion_ids]


def grpo_step(spec: Spec):
    from trl import GRPOConfig, GRPOTrainer

    rows = spec.prompts_per_step * spec.group_size
    config = GRPOConfig(
        **common(spec),
        max_steps=1_000_000,
        per_device_train_batch_size=spec.peer_rows,
        gradient_accumulation_steps=rows // spec.peer_rows,
        num_generations=spec.group_size,
        max_completion_length=spec.max_new_tokens,
        generation_kwargs={"min_new_tokens": spec.max_new_tokens},
        temperature=1.0,
        top_k=0,
        beta=spec.kl_coef,
        loss_type="grpo",
        model_init_kwargs={"dtype": "float32"},
        shuffle_dataset=False,
    )
    return GRPOTrainer(
        model=spec.model,
        reward_funcs=sevens,
        args=config,
        train_dataset=Dataset.from_list(spec.rows("prompts") * 1000),  # the same prompts each step; epochs rarely end
        processing_class=AutoTokenizer.from_pretrained(spec.model, padding_side="left", trust_remote_code=False),
        callbacks=[TakeTurns(spec)],
    )


def ppo_step(spec: Spec):
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(spec.model, padding_side="left", trust_remote_code=False)
    prompts = Dataset.from_list([{"input_ids": tokenizer(row["prompt"])["input_ids"]} for row in spec.rows("prompts")])
    config = PPOConfig(
        **common(spec),
        total_episodes=1_000_000 * spec.prompts_per_step,
        per_device_train_batch_size=spec.peer_rows,
        gradient_accumulation_steps=spec.prompts_per_step // spec.peer_rows,
        num_mini_batches=1,
        num_ppo_epochs=1,
        local_rollout_forward_batch_size=spec.peer_rows,
        response_length=spec.max_new_tokens,
        temperature=1.0,
        kl_coef=spec.kl_coef,
        num_sample_generations=0,
    )
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(
            spec.model, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        )
        for _ in range(2)
    )
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(
            spec.reward_model, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        )
        for _ in range(2)
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=prompts,
        eval_dataset=prompts,
        callbacks=[TakeTurns(spec)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def reward_epoch(spec: Spec):
    from trl import RewardConfig, RewardTrainer

    config = RewardConfig(
        **common(spec),
        num_train_epochs=1_000_000,
        per_device_train_batch_size=spec.peer_rows,
        gradient_accumulation_steps=spec.pairs_per_step // spec.peer_rows,
        max_length=spec.max_length,
    )
    model = AutoModelForSequenceClassification.from_pretrained(
        spec.reward_model, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    return RewardTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(spec.rows("pairs")),
        processing_class=AutoTokenizer.from_pretrained(spec.reward_model, trust_remote_code=False),
        callbacks=[TakeTurns(spec)],
    )


if __name__ == "__main__":
    chosen = {"grpo_step": grpo_step, "ppo_step": ppo_step, "reward_epoch": reward_epoch}[sys.argv[1]]
    chosen(Spec.read(sys.argv[2])).train()
