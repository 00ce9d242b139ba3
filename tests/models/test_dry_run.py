"""Models without memory: they have the shapes of those in memory, and a pass allocates what torch counts there."""

from __future__ import annotations

import gc

import pytest
import torch
from benchmarks.live_bytes import peak_bytes
from transformers import BloomConfig, MixtralConfig, Phi3Config

from tether.errors import ModelError
from tether.models.adapters import Lora, add_adapter
from tether.models.checkpointing import checkpoint_activations
from tether.models.dry_run import Allocated, Form, shell, states, without_memory
from tether.models.linear import round_matmuls
from tether.models.loading import load_policy
from tether.models.packing import pack
from tether.models.policy import completion_states, final_states, packed_states, project
from tether.models.reward import new_reward_model
from tether.ops.logprobs import chunked_logprobs
from tether.types import Batch
from tiny import ARCHITECTURES, byte_tokenizer

ROWS = [((3 + i,) * (9 + i), (7,) * (20 + k)) for i in range(3) for k in range(4)]


def batch() -> Batch:
    return Batch.collate(ROWS)


def test_bytes_by_hand():
    parts, peaks = {}, {}
    with Allocated() as allocated:
        with allocated.held(parts, "kept"):
            kept = torch.zeros(4, 5)  # 80 bytes
            kept.view(20).add_(1)  # none
        with allocated.at_most(peaks, "work"):
            more = torch.zeros(10, dtype=torch.float64)  # 80
            more = more.float() + 1  # 40 and 40, and then the 80 and the first 40 are released
            del more
        assert allocated.now == 80
    assert parts == {"kept": 80}
    assert peaks == {"work": 160}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_shell_has_the_weights_of_the_model(architecture, tiny_models):
    model, _ = load_policy(tiny_models[architecture])
    with without_memory() as allocated:
        found = shell(Form.named(tiny_models[architecture]), dtype=torch.float32)
        held = allocated.now
    sizes = {name: (weight.shape, weight.dtype) for name, weight in found.named_parameters()}
    assert sizes == {name: (weight.shape, weight.dtype) for name, weight in model.named_parameters()}
    assert all(weight.is_meta for weight in found.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert sum(weight.nbytes for weight in model.parameters()) <= held
    assert held <= sum(weight.nbytes for weight in model.parameters()) + buffers + 200_000  # and what made them


def test_the_classifier_on_a_trunk(tiny):
    model, _ = new_reward_model(tiny, seed=0)
    with without_memory():
        found = shell(Form.named(tiny), dtype=torch.float32, classifier=True)
    assert {name: w.shape for name, w in found.named_parameters()} == {
        name: w.shape for name, w in model.named_parameters()
    }


def plain(model):
    return model


def adapted(model):
    add_adapter(model, Lora(lora_rank=4), seed=0)
    return model


def rounded(model):
    round_matmuls(model)
    return model


def checkpointed(model):
    checkpoint_activations(model)
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mistral"])
@pytest.mark.parametrize("change", [plain, adapted, rounded, checkpointed])
def test_a_pass_allocates_what_the_allocator_of_torch_counts(architecture, change, tiny_models):
    """Forward and backward, of packed groups; both peaks are in bytes of tensors, so that they may differ by the few
    that operations allocate within themselves."""
    model = change(load_policy(tiny_models[architecture])[0])

    def learn(hidden, own) -> None:
        logp, _ = chunked_logprobs(hidden, torch.zeros(len(hidden), dtype=torch.int64), project(own), entropy=True)
        logp.sum().backward()

    def real() -> None:
        model.zero_grad()
        packed = pack(batch(), ends=False)
        learn(packed_states(model.base_model, packed)[packed.states], model)

    real()
    model.zero_grad()
    gc.collect()
    peaks: dict[str, int] = {}
    with without_memory() as allocated:
        own = change(shell(Form.named(tiny_models[architecture]), dtype=torch.float32))
        with allocated.at_most(peaks, "pass"):
            learn(states(own.base_model, batch_of_the_host(), ends=False), own)
    assert peaks["pass"] == pytest.approx(peak_bytes(real, "cpu"), rel=0.06)


def batch_of_the_host() -> Batch:
    with torch.device("cpu"):
        return batch()


@pytest.mark.parametrize("ends", [True, False])
def test_states_have_the_shape_of_the_real_ones(ends, tiny):
    model, _ = load_policy(tiny)
    real = (final_states if ends else completion_states)(model.base_model, batch())
    with without_memory():
        found = states(shell(Form.of(model), dtype=torch.float32).base_model, batch_of_the_host(), ends=ends)
    assert (found.shape, found.dtype) == (real.shape, real.dtype)


def test_a_form_of_a_model_in_memory_has_its_adapter_and_its_padding(tiny, tmp_path):
    model = adapted(load_policy(tiny)[0])
    with without_memory():
        found = shell(Form.of(model), dtype=torch.bfloat16)
    assert {name: w.shape for name, w in found.named_parameters()} == {
        name: w.shape for name, w in model.named_parameters()
    }
    assert {w.dtype for name, w in found.named_parameters() if "lora" in name} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=264, hidden_size=32, n_layer=2, n_head=4),
        MixtralConfig(
            vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4,
        ),
        Phi3Config(
            vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, original_max_position_embeddings=64, pad_token_id=0,
            rope_scaling={"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        ),
    ],
    ids=["padded", "experts", "longrope"],
)  # fmt: skip
def test_other_architectures_run_without_memory(config, dtype):
    with without_memory():
        model = shell(Form(config, unpacked=isinstance(config, BloomConfig)), dtype=dtype)
        found = states(model.base_model, batch_of_the_host(), ends=False)
        found.sum().backward()
        assert {weight.grad.dtype for weight in model.base_model.parameters() if weight.grad is not None} == {dtype}
    assert found.dtype == dtype
    assert found.shape == (sum(len(completion) for _, completion in ROWS), 32)


def test_a_directory_needs_its_configuration_alone(tmp_path, tiny):
    ARCHITECTURES["llama"].save_pretrained(tmp_path / "config")
    assert Form.named(str(tmp_path / "config")).config.hidden_size == 32
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        Form.named(str(tmp_path / "tokenizer"))
