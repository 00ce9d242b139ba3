"""What an unknown name may stand for: one that is mistyped, and options of earlier versions and of other tools.

The error for a command line or a file from elsewhere so says what to change.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

CLOSE = 0.75
"""Similarity, of 1, from which an unknown name is taken for a mistyped one; at 0.5 most hints were of other options."""


def closest(name: str, known: Sequence[str]) -> list[str]:
    """Up to three names that begin like this one, or else the closest one; none where none is close."""
    longer = [one for one in known if len(name) > 1 and one.startswith(name)]
    return longer[:3] or difflib.get_close_matches(name, known, n=1, cutoff=CLOSE)


def metric_and_sign(option: str) -> tuple[str, float]:
    """The metric that an option such as ``--keep-best`` names, and 1 where its highest value is the best one, -1 where
    a minus before the name asks for the lowest.

    >>> metric_and_sign("reward"), metric_and_sign("-eval/loss")
    (('reward', 1.0), ('eval/loss', -1.0))
    """
    return (option.removeprefix("-"), -1.0) if option.startswith("-") else (option, 1.0)


def did_you_mean(names: Sequence[str]) -> str:
    """``did you mean A or B?``; "" for no names."""
    return f"did you mean {' or '.join(names)}?" if names else ""


RENAMED: Mapping[str, tuple[str, ...]] = {
    "products": ("matmul_dtype",),
    "refills": ("dynamic_sampling",),
    "kl_target": ("adaptive_kl_target",),
    "kl_horizon": ("adaptive_kl_horizon",),
    "samples_per_prompt": ("group_size",),
    "clip_eps": ("clip_low", "clip_high"),
    "value_clip_eps": ("value_clip",),
}
"""Names that options had in earlier versions, and those they have now."""

_BATCH = ("batch_size", "prompts_per_step")
_EPOCHS = ("epochs", "epochs_per_step")
_CLIP = ("clip_low", "clip_high")

ELSEWHERE: Mapping[str, tuple[str, ...]] = {
    # models, data and output: transformers and TRL, then OpenRLHF, then verl
    "model_name_or_path": ("model",),
    "pretrain": ("model",),
    "policy": ("model",),
    "sft_model_path": ("model",),
    "reward_model_path": ("reward",),
    "reward_funcs": ("reward",),
    "reward_pretrain": ("reward",),
    "remote_rm_url": ("reward",),
    "dataset": ("data", "pairs", "prompts"),
    "dataset_name": ("data", "pairs", "prompts"),
    "train_file": ("data", "pairs", "prompts"),
    "train_files": ("data", "pairs", "prompts"),
    "prompt_data": ("prompts",),
    "eval_dataset": ("eval_data", "eval_pairs", "eval_prompts"),
    "val_files": ("eval_data", "eval_pairs", "eval_prompts"),
    "output": ("out",),
    "output_dir": ("out",),
    "save_path": ("out",),
    "default_local_dir": ("out",),
    "overwrite_output_dir": ("overwrite",),
    "save_steps": ("save_every",),
    "save_freq": ("save_every",),
    "save_total_limit": ("keep_last",),
    "max_ckpt_num": ("keep_last",),
    "metric_for_best_model": ("keep_best",),
    "eval_steps": ("eval_every",),
    "test_freq": ("eval_every",),
    "report_to": ("track",),
    "use_wandb": ("track",),
    "logger": ("track",),
    "load_best_model_at_end": ("keep_best",),
    "bf16": ("dtype", "matmul_dtype"),
    "torch_dtype": ("dtype",),
    "gradient_checkpointing": ("checkpoint_activations",),
    # batches and lengths of a run
    "per_device_train_batch_size": _BATCH,
    "train_batch_size": _BATCH,
    "rollout_batch_size": ("prompts_per_step",),
    "micro_train_batch_size": ("micro_batch_tokens",),
    "gradient_accumulation_steps": ("micro_batch_tokens",),
    "ppo_max_token_len_per_gpu": ("micro_batch_tokens",),
    "ppo_mini_batch_size": ("minibatches",),
    "num_mini_batches": ("minibatches",),
    "num_train_epochs": ("epochs", "steps"),
    "max_epochs": _EPOCHS,
    "total_epochs": ("epochs", "steps"),
    "num_episodes": ("steps",),
    "total_episodes": ("steps",),
    "max_steps": ("steps", "epochs"),
    "total_training_steps": ("steps",),
    "num_ppo_epochs": ("epochs_per_step",),
    "ppo_epochs": ("epochs_per_step",),
    "num_iterations": ("epochs_per_step",),
    # sampling
    "num_generations": ("group_size",),
    "n_samples_per_prompt": ("group_size",),
    "best_of_n": ("group_size",),
    "max_completion_length": ("max_new_tokens",),
    "max_response_length": ("max_new_tokens",),
    "response_length": ("max_new_tokens",),
    "generate_max_len": ("max_new_tokens",),
    "max_tokens": ("max_new_tokens",),
    "top_k": ("top_k_tokens",),
    "stop_token": ("stop",),
    "stop_strings": ("stop",),
    "max_length": ("overlong",),
    "max_seq_length": ("overlong",),
    "max_prompt_length": ("overlong",),
    "prompt_max_len": ("overlong",),
    # the objective
    "beta": ("kl_coef",),
    "init_kl_coef": ("kl_coef",),
    "kl_loss_coef": ("kl_coef",),
    "kl_loss_type": ("kl_estimator",),
    "target": ("adaptive_kl_target",),
    "epsilon": _CLIP,
    "eps_clip": _CLIP,
    "cliprange": _CLIP,
    "clip_range": _CLIP,
    "clip_ratio": _CLIP,
    "clip_ratio_low": ("clip_low",),
    "clip_ratio_high": ("clip_high",),
    "epsilon_high": ("clip_high",),
    "cliprange_value": ("value_clip",),
    "vf_coef": ("value_coef",),
    "discount": ("gamma",),
    "gae_lambda": ("lam",),
    "lambd": ("lam",),
    "ent_coef": ("entropy_coef",),
    "entropy_coeff": ("entropy_coef",),
    "entropy_loss_coef": ("entropy_coef",),
    "scale_rewards": ("advantage_scale",),
    "norm_adv_by_std_in_grpo": ("advantage_scale",),
    "advantage_estimator": ("advantage_baseline", "advantage_scale"),
    "loss_type": ("policy_loss", "loss_reduction"),
    "loss_mode": ("policy_loss",),
    "policy_loss_type": ("policy_loss",),
    "delta": ("clip_dual",),
    "dual_clip": ("clip_dual",),
    "clip_ratio_c": ("clip_dual",),
    "tau_pos": ("sapo_tau_pos",),
    "tau_neg": ("sapo_tau_neg",),
    "sapo_temperature_pos": ("sapo_tau_pos",),
    "sapo_temperature_neg": ("sapo_tau_neg",),
    "vllm_importance_sampling_correction": ("mismatch",),
    "vllm_importance_sampling_mode": ("mismatch", "mismatch_level"),
    "vllm_importance_sampling_cap": ("mismatch_cap",),
    "vllm_importance_sampling_clip_max": ("mismatch_cap",),
    "enable_vllm_is_correction": ("mismatch",),
    "vllm_is_truncated_threshold": ("mismatch_cap",),
    "rollout_is": ("mismatch", "mismatch_level"),
    "rollout_is_threshold": ("mismatch_cap",),
    "tis_imp_ratio_cap": ("mismatch_cap",),
    "mask_truncated_completions": ("mask_truncated",),
    "overlong_filter": ("mask_truncated",),
    "use_adaptive_entropy": ("entropy_target",),
    "entropy_coef_delta": ("entropy_step",),
    "loss_agg_mode": ("loss_reduction",),
    "importance_sampling_level": ("ratio_level",),
    "dynamic_filtering": ("dynamic_sampling",),
    "center_rewards_coefficient": ("centring",),
    "early_stopping_patience": ("patience",),
    # the optimizer
    "lr": ("learning_rate",),
    "actor_learning_rate": ("learning_rate",),
    "value_lr": ("critic_learning_rate",),
    "lr_scheduler": ("lr_schedule",),
    "lr_scheduler_type": ("lr_schedule",),
    "warmup_ratio": ("warmup_steps",),
    "lr_warmup_steps": ("warmup_steps",),
    "l2": ("weight_decay",),
    "adam_epsilon": ("adam_eps",),
    "adam_betas": ("adam_beta1", "adam_beta2"),
    "max_norm": ("max_grad_norm",),
    "grad_clip": ("max_grad_norm",),
}
"""What TRL, transformers, OpenRLHF and verl (the last part of its dotted keys) call options, and our names, of which a
command may have some only."""
