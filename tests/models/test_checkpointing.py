"""Checkpointed activations: the same gradient, with less kept for the backward pass."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BioGptConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from helpers import gradient, relative_error
from tether.models.adapters import Lora, adapter_dropout, add_adapter
from tether.models.checkpointing import checkpoint_activations
from tether.models.loading import load_policy
from tether.models.policy import Critic, completion_logprobs
from tether.models.reference import reference_of
from tether.models.unpacked import set_unpacked
from tether.types import Batch
from tiny import ARCHITECTURES, VOCAB, byte_tokenizer

ROWS = [((5, 6, 7, 8), (9, 10, 11)), ((5, 6, 7, 8), (12,)), ((13,), (14, 15))]


def gradient_and_bytes_kept(policy):
    """The gradient of a likelihood, and the bytes that the forward pass saves for it."""
    kept: dict[int, int] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    policy.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = completion_logprobs(policy, Batch.collate(ROWS * 4), temperature=1.0)[0].sum()
    loss.backward()
    return gradient(policy).clone(), sum(kept.values())


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_gradient_is_the_same_and_less_is_kept(architecture, padded, tiny_models):
    policy = load_policy(tiny_models[architecture])[0]
    set_unpacked(policy, padded)
    plain, all_kept = gradient_and_bytes_kept(policy)
    checkpoint_activations(policy)
    checkpointed, few_kept = gradient_and_bytes_kept(policy)
    assert relative_error(checkpointed, plain) < 1e-6
    assert few_kept < 0.6 * all_kept


def test_copies_of_a_checkpointed_policy_work_too(tiny):
    """The reference and the critic's trunk are copies; the layout in their backward pass has to be their own."""
    policy = load_policy(tiny)[0]
    batch = Batch.collate(ROWS)
    gradients = []
    for _ in range(2):
        critic = Critic(policy, own_trunk=True)
        torch.nn.init.ones_(critic.head.weight)
        critic(batch, lambda: None).square().sum().backward()
        gradients.append(gradient(critic))
        checkpoint_activations(policy)
    assert relative_error(gradients[1], gradients[0]) < 1e-6
    with torch.no_grad(), reference_of(policy).model() as reference:
        a, b = (completion_logprobs(model, batch, temperature=1.0)[0] for model in (policy, reference))
    assert torch.equal(a, b)


def test_dropout_stays_off(tiny_models):
    policy = load_policy(tiny_models["gpt2"])[0]
    checkpoint_activations(policy)
    assert not any(module.training for module in policy.modules() if isinstance(module, torch.nn.Dropout))


def test_dropout_of_a_layer_itself_stays_off(tmp_path):
    """BioGPT's layers drop by their own mode."""
    torch.manual_seed(0)
    config = BioGptConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path))[0]
    plain, _ = gradient_and_bytes_kept(policy)
    checkpoint_activations(policy)
    assert relative_error(gradient_and_bytes_kept(policy)[0], plain) < 1e-6
    assert all(layer.training for layer in policy.modules() if isinstance(layer, GradientCheckpointingLayer))


def test_dropout_of_an_adapter_is_the_same_when_a_layer_runs_again(tiny):
    policy = load_policy(tiny)[0]
    add_adapter(policy, Lora(lora_rank=4, lora_dropout=0.5), seed=0)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    gradients = []
    for _ in range(2):
        with adapter_dropout(policy, "test", 0):
            gradients.append(gradient_and_bytes_kept(policy)[0])
        checkpoint_activations(policy)
    assert relative_error(gradients[1], gradients[0]) < 1e-6
