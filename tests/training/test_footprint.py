"""What a run holds, against numbers by hand, and the rows of its largest pass, against the batching of the run."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tether.commands import TABLE, find
from tether.data.batching import micro_batches
from tether.errors import ModelError
from tether.flags import parse
from tether.generation.cache import Pool, extent
from tether.models.dry_run import BITS_PER_WEIGHT, Form, saved_by_quantising, shell, without_memory
from tether.training.fit import STAND_INS
from tether.training.footprint import CPU_SLACK, LIBRARIES, batch_of, dry_run, largest_part, tokens
from tether.training.step_time import ADAM_BYTES, Amounts, Rates, seconds
from tether.training.workload import WORKLOADS, Extent, longest

CONFIG = LlamaConfig(
    vocab_size=264,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
N = AutoModelForCausalLM.from_config(CONFIG).num_parameters()
HEAD = 264 * 32
CPU, GPU = torch.device("cpu"), torch.device("cuda")
PROMPTS = [(10, [])] * 4
SAMPLED = "--prompts-per-step 4 --group-size 2 --max-new-tokens 16"


def work_of(title, line="", rows=PROMPTS, **more):
    command = find(title, TABLE)
    options = parse(title, command.options_class(), ["--model", "m", *line.split()], given=STAND_INS)
    return WORKLOADS[title](options, Extent(policy=Form(CONFIG), rows=rows, **more))


def found(title, line="", rows=PROMPTS, *, device=GPU, matmul_dtype="float32", **more):
    work = work_of(title, line, rows, **more)
    return dry_run(work, matmul_dtype=matmul_dtype, device=device, process=1000, memory=2**30)


def test_all_weights_in_float32_by_hand():
    one = found("grpo", SAMPLED)
    assert one.held == {"weights": pytest.approx(4 * N, abs=2000), "reference": pytest.approx(4 * N, abs=2000),
                        "optimizer": 8 * N}  # fmt: skip
    assert one.update["gradients"] == 4 * N
    assert one.process == 0
    assert one.peak == sum(one.held.values()) + one.phases["update"]


def test_all_weights_in_bfloat16_by_hand():
    one = found("ppo", f"{SAMPLED} --dtype bfloat16")
    assert one.held["weights"] == pytest.approx(2 * N, abs=2000)
    assert one.held["master weights"] == 4 * (N + 33)  # and the critic's
    assert one.held["optimizer"] == 8 * (N + 33)
    assert one.update["gradients"] == 4 * (N + 33)


def test_an_adapter_needs_no_reference_and_little_else():
    one = found("grpo", f"{SAMPLED} --lora-rank 2 --dtype bfloat16")
    linears = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    weights = 2 * sum(2 * (wide + long) for wide, long in linears)
    assert one.held == {"weights": pytest.approx(2 * N, abs=2000), "adapter": 4 * weights, "optimizer": 8 * weights}
    assert one.update["gradients"] == 4 * weights
    former = found("grpo", SAMPLED, rows=PROMPTS)
    assert one.peak < former.peak


def test_rounded_copies_are_half_of_the_float32_weights_that_are_multiplied():
    one = found("sft", rows=[(8, [8])] * 4, matmul_dtype="bfloat16")
    assert one.held["rounded copies of weights"] == 2 * (N - HEAD - 5 * 32)  # without the embedding and the norms


def test_a_reward_model_has_its_best_weights_too_and_no_logits():
    one = found("reward", rows=[(8, [8, 8])] * 4)
    trunk = N - HEAD + 32
    assert one.held["best weights"] == pytest.approx(4 * trunk, abs=2000)
    assert one.held["optimizer"] == 8 * trunk
    assert one.phases.keys() == {"update"}


def test_keys_and_values_by_hand():
    one = found("grpo", f"{SAMPLED} --max-rows 4", device=CPU)
    per_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes
    own, slot = extent(16, CPU), extent(10, CPU)
    work = work_of("grpo", f"{SAMPLED} --max-rows 4")
    with without_memory():
        assert Pool.bytes_per_token(shell(work.policy, dtype=torch.float32)) == per_token
    cache = per_token * (4 * own + 3 * slot)  # four of eight completions at a time, and room for a prompt more than two
    assert cache <= one.phases["sampling"] / CPU_SLACK
    assert one.process == 1000 + LIBRARIES


def test_a_reward_model_among_the_rewards_is_held_and_scores():
    one = found("grpo", SAMPLED, reward_models=[Form(CONFIG)])
    assert one.held["reward models"] == pytest.approx(4 * (N - HEAD + 32), abs=2000)
    assert one.phases["scoring"] > 0
    assert one.amounts.scoring > 0


def test_of_several_micro_batches_one_has_the_gradient_of_those_before_beside_it():
    rows = [(8, [8])] * 8
    whole, parts = found("sft", rows=rows), found("sft", "--micro-batch-tokens 16", rows=rows)
    single = found("sft", "--batch-size 1", rows=rows)
    assert parts.update["activations"] == single.update["activations"] < whole.update["activations"]
    assert parts.phases["update"] >= single.phases["update"]
    assert parts.phases["update"] >= parts.update["gradients"] + parts.update["activations"]


def test_checkpointed_activations_and_the_trunk_of_a_critic():
    rows = [(64, [])] * 4
    plain, saved, own = (
        found("ppo", f"{SAMPLED} --max-new-tokens 64 {more}", rows=rows)
        for more in ("", "--checkpoint-activations", "--critic-trunk")
    )
    assert saved.update["activations"] < 0.5 * plain.update["activations"]
    assert own.held["critic"] == pytest.approx(4 * (N - HEAD + 33), abs=4000)
    assert own.update["activations"] > 1.5 * plain.update["activations"]


def test_quantised_weights_by_hand():
    with without_memory():
        model = shell(Form(CONFIG), dtype=torch.bfloat16)
    linear, largest = N - 2 * HEAD - 5 * 32, 48 * 32
    assert saved_by_quantising(model, "8bit") == linear - 2 * largest
    assert saved_by_quantising(model, "4bit") == int(linear * (2 - BITS_PER_WEIGHT["4bit"] / 8)) - 2 * largest


@pytest.mark.parametrize("budget", [20, 64, 500])
def test_the_largest_part_is_one_of_the_run(budget):
    rows = [(5, [7, 3]), (20, [4]), (9, [9, 9, 9])]
    part, count = largest_part(rows, budget)
    batch = batch_of(rows)
    real = micro_batches(batch, budget)
    assert count == len(real)

    def size(index):
        own = batch.rows(index)
        shared = {int(i): int(n) for i, n in zip(own.prompt_index, own.prompt_lengths, strict=True)}
        return sum(shared.values()) + int(own.completion_lengths.sum())

    assert tokens(part) == max(map(size, real))


def test_the_rows_of_a_step():
    assert longest([(1, [1]), (5, [2]), (3, [9])], 2) == [(3, [9]), (5, [2])]
    work = work_of("ppo", f"{SAMPLED} --minibatches 2", rows=[(3, []), (9, []), (4, []), (5, []), (2, [])])
    assert work.sampled.groups == [(9, [16, 16]), (5, [16, 16]), (4, [16, 16]), (3, [16, 16])]
    assert work.rows == [(9, [16]), (5, [16]), (4, [16]), (3, [16])]
    assert work.updates == 4
    odd = work_of("grpo", "--prompts-per-step 1 --group-size 3 --minibatches 2 --max-new-tokens 4", rows=[(3, [])])
    assert odd.rows == [(3, [4, 4])]
    best = work_of("rejection-sampling", "--group-size 4 --top-k 2 --batch-size 3", rows=PROMPTS)
    assert best.rows == [(10, [64])] * 3
    assert best.updates == pytest.approx(8 / 3)


def test_what_cannot_be_run_without_memory_says_why(monkeypatch):
    def looks(*_args, **_more):
        return torch.zeros(()).item()

    monkeypatch.setattr("tether.training.footprint.round_matmuls", looks)
    with pytest.raises(ModelError, match="LlamaConfig: its memory cannot be estimated"):
        found("sft", rows=[(8, [8])], matmul_dtype="bfloat16")


def test_seconds_by_hand():
    rates = Rates(large=100.0, few_rows=10.0, bandwidth=50.0)
    amounts = Amounts(prompts=200.0, decoding_steps=3, rows=2, weights=5, reference=100.0, update=300.0, adapted=25.0)
    assert seconds(amounts, rates) == {
        "sampling": 2.0 + 3 * 2 * 5 * 2 / 10.0,
        "reference": 1.0,
        "update": 3.0 + ADAM_BYTES * 25 / 50.0,
    }


def test_amounts_of_a_step():
    amounts = found("grpo", f"{SAMPLED} --max-rows 3 --epochs-per-step 2").amounts
    assert (amounts.rows, amounts.decoding_steps) == (3, 16 * 3)
    assert amounts.weights == N - HEAD - 5 * 32
    assert amounts.adapted == 2 * N
    assert amounts.update == pytest.approx(2 * 3 * amounts.reference)
