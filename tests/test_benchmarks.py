"""What the benchmarks compute around their timings: operations, ratios, live bytes, lines, inputs."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from benchmarks import flops
from benchmarks.cost import Line
from benchmarks.duel import OURS, Contender, Result, Spread, contest, ratio
from benchmarks.flops import Shape, Work
from benchmarks.live_bytes import peak_bytes, peak_of
from benchmarks.worker import Spec
from benchmarks.workload import around, write_models, write_pairs, write_prompts

from tether.models.loading import load_policy, load_tokenizer
from tether.ops.surrogates import Mismatch, PolicyLoss

SMALL = Shape(layers=2, width=8, intermediate=12, heads=2, kv_heads=1, head_dim=4, vocabulary=4096, context=64)
LAYER = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 12  # q, k, v, o and the three of the feed-forward layer


ROWS = {
    "--clip-dual", "--mask-truncated", "--positive-only", "--pass-at-k", "--entropy-coef",
    "--advantage-baseline batch --advantage-scale batch",
    *(f"--policy-loss {kind}" for kind in get_args(PolicyLoss) if kind != "clip"),
    *(f"--mismatch {kind}" for kind in get_args(Mismatch) if kind != "off"),
}  # fmt: skip


@pytest.mark.parametrize(("table", "more"), [("optima", {"--entropy-target", "--mismatch off"}), ("cost", set())])
def test_every_option_of_the_loss_has_a_row_in_the_tables_of_optima_and_cost(table, more):
    text = (Path(__file__).parents[1] / "docs" / "losses.md").read_text(encoding="utf-8")
    _, rows, _ = re.split(f"<!-- (?:{table}: .*|end of {table}) -->", text)
    for option in ROWS | more:
        assert re.search(rf"^\| `(?:\(ppo\) )?{option}\b.* \| -?\d", rows, re.MULTILINE), option


def test_forward_operations_are_those_that_torch_counts():
    from benchmarks.workload import config_of
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    config = config_of(SMALL, load_tokenizer("base"))
    config._attn_implementation = "eager"  # whose products torch counts over the whole square, not the causal half
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(input_ids=torch.zeros(3, 7, dtype=torch.int64), use_cache=False)
    assert counted.get_total_flops() == flops.forward(SMALL, tokens=21, attended=3 * 7 * 7, heads=21)


def test_operations_by_hand():
    head = 8 * 4096
    # two prompts of 3 and 5 tokens, G = 2, 4 new tokens, of which the last goes through no layer
    pairs_of_prompts = (1 + 2 + 3) + (1 + 2 + 3 + 4 + 5)
    pairs_of_tails = 2 * ((4 + 5 + 6) + (6 + 7 + 8))
    per_pair = 2 * 4 * 2 * 4  # layers, two products of 2 operations, heads, head width
    prefill = 2 * 2 * LAYER * 8 + per_pair * pairs_of_prompts + 2 * head * 2
    decode = 2 * 2 * LAYER * 12 + per_pair * pairs_of_tails + 2 * head * 12
    # weights three times; both prompts' keys and values three times; 1 + 2 + 3 own positions for each of four rows
    moved = 4 * (3 * (2 * LAYER + head) + 2 * 2 * 4 * (3 * 8 + 4 * 6))
    rollout = flops.rollout(SMALL, [3, 5], group_size=2, new_tokens=4, bytes_per_number=4)
    assert rollout == Work(operations=prefill, decode_operations=decode, decode_bytes=moved)

    once = 2 * 2 * LAYER * (8 + 12) + per_pair * (pairs_of_prompts + pairs_of_tails) + 2 * head * 16
    step = flops.grpo_step(SMALL, [3, 5], group_size=2, new_tokens=4, bytes_per_number=4)
    assert step == rollout + Work(operations=4 * once)

    # a pair that shares 2 tokens, with 1 and 3 of its own
    pairs = (1 + 2) + 3 + (3 + 4 + 5)
    assert flops.reward_epoch(SMALL, [2], [(1, 3)]) == Work(operations=3 * (2 * 2 * LAYER * 6 + per_pair * pairs))


def test_ppo_counts_each_models_passes():
    step = flops.ppo_step(SMALL, [3], new_tokens=4, bytes_per_number=4)
    trunk = 2 * 2 * LAYER * 6 + 64 * (1 + 2 + 3 + 4 + 5 + 6)  # prompt and three tokens
    judged = 2 * 2 * LAYER * 8 + 64 * (1 + 2 + 3 + 4 + 5 + 6 + 7 + 8)  # all four tokens and EOS
    rollout = flops.rollout(SMALL, [3], group_size=1, new_tokens=4, bytes_per_number=4)
    assert step.operations - rollout.operations == 4 * (trunk + 2 * 8 * 4096 * 4) + 3 * trunk + judged


def test_decoding_is_bounded_by_the_slower_of_arithmetic_and_memory():
    work = Work(operations=20.0, decode_operations=30.0, decode_bytes=8.0)
    assert work.seconds(matrix_rate=10.0, bandwidth=1.0) == 2.0 + 8.0
    assert work.seconds(matrix_rate=10.0, bandwidth=4.0) == 2.0 + 3.0


def test_ratio_of_medians_and_range_of_rounds():
    assert Spread.of([3.0, 1.0, 8.0]) == Spread(3.0, 1.0, 8.0)
    assert ratio([4.0, 9.0, 8.0], [2.0, 3.0, 8.0]) == Spread(8 / 3, 1.0, 3.0)


def test_summary_holds_shares_of_the_limit():
    turns = {OURS: [{"seconds": 4.0}], "peer": [{"seconds": 10.0}]}
    result = Result(title="t", work=Work(operations=6.0), matrix_rate=3.0, bandwidth=1.0, turns=turns)
    sides = json.loads(json.dumps(result.summary()))["sides"]
    assert sides[OURS]["share_of_limit"] == 0.5
    assert sides["peer"]["share_of_limit"] == 0.2
    assert sides["peer"]["times_tether"] == {"median": 2.5, "low": 2.5, "high": 2.5}


def test_peak_of_changes():
    assert peak_of([5, -2, 4, -7, 6]) == 7
    assert peak_of([-3, 1]) == 0


def test_live_bytes_of_known_allocations():
    size = 4 * 2**20  # bytes of 2**20 float32

    def one_after_another() -> None:
        for _ in range(3):
            torch.empty(2**20)

    def together() -> None:
        held = [torch.empty(2**20) for _ in range(3)]
        held.clear()

    def inside_an_operation() -> None:
        a = torch.ones(1024, 1024)
        a.add_(a.t() + 1)  # one temporary

    slack = 2**16
    assert abs(peak_bytes(one_after_another, "cpu") - size) < slack
    assert abs(peak_bytes(together, "cpu") - 3 * size) < slack
    assert abs(peak_bytes(inside_an_operation, "cpu") - 2 * size) < slack


def test_line_through_points():
    line = Line.through([1, 2, 4], [5.0, 7.0, 11.0])
    assert (line.base, line.slope, line.r_squared) == pytest.approx((3.0, 2.0, 1.0))


def test_inputs_have_the_sizes_asked_for(tmp_path):
    policy, _, tokenizer = write_models(tmp_path, SMALL)
    model, own = load_policy(policy)
    weights = {name: p.numel() for name, p in model.named_parameters() if "norm" not in name}
    assert sum(weights.values()) == 2 * LAYER + 8 * 4096
    lengths = around(55, 8)
    assert sum(lengths) / 8 == pytest.approx(55, abs=1)
    prompts = Path(write_prompts(tmp_path / "prompts.jsonl", tokenizer, [*lengths, 1024])).read_text().splitlines()
    assert [len(own(json.loads(line)["prompt"])["input_ids"]) for line in prompts] == [*lengths, 1024]


def test_pairs_share_their_beginning_once(tmp_path):
    import gzip

    tokenizer = load_tokenizer("base")
    rows = [("one two three", "one two four five"), ("x " * 400, "y"), ("the cat", "the dog")]
    with gzip.open(tmp_path / "helpful-base.test.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"chosen": a, "rejected": b}) + "\n" for a, b in rows)
    path, shared, sides = write_pairs(tmp_path / "pairs.jsonl", tmp_path, tokenizer, count=2, max_length=64)
    kept = [json.loads(line)["chosen"] for line in Path(path).read_text().splitlines()]
    assert kept == ["one two three", "the cat"]
    for (a, b), same, (left, right) in zip((rows[0], rows[2]), shared, sides, strict=True):
        assert same + left == len(tokenizer(a)["input_ids"]) + 1
        assert same + right == len(tokenizer(b)["input_ids"]) + 1
    with pytest.raises(ValueError, match="only 2 pairs"):
        write_pairs(tmp_path / "pairs.jsonl", tmp_path, tokenizer, count=3, max_length=64)


@pytest.mark.slow
def test_sides_take_turns_and_a_failing_one_drops_out(tmp_path, monkeypatch):
    """tether's own worker against a script that takes one turn and says that it cannot."""
    monkeypatch.setattr("benchmarks.duel.matrix_rate", lambda *_: 1e9)
    monkeypatch.setattr("benchmarks.duel.bandwidth", lambda *_: 1e9)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    policy, reward, tokenizer = write_models(tmp_path, SMALL)
    spec = Spec(
        model=policy,
        reward_model=reward,
        prompts=write_prompts(tmp_path / "prompts.jsonl", tokenizer, [5, 9]),
        group_size=2,
        prompts_per_step=2,
        max_new_tokens=3,
    )
    script = tmp_path / "failing"
    script.write_text("#!/bin/sh\necho ready; read turn; echo no room >&2; exit 1\n")
    script.chmod(0o755)
    both = [Contender(name=OURS, python=sys.executable, module="ours", task="rollout")]
    both.append(Contender(name="peer", python=str(script), module="none", task="none"))
    result = contest("t", both, spec, Work(operations=1.0), rounds=2, patience=0.0)
    assert {name: len(turns) for name, turns in result.turns.items()} == {OURS: 2}
    assert result.failed == {"peer": "no room"}
    assert all(seconds > 0 for seconds in result.seconds(OURS))


def test_what_both_sides_share_needs_the_standard_library_alone():
    code = "import sys; import benchmarks.worker; sys.exit(any(m in sys.modules for m in ('torch', 'tether')))"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
