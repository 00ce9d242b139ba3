"""Memory that really is short: limits on the address space of this process. ``faults/test_short_memory.py`` starts it,
because a library that has once failed to get memory may remember it. Freed memory has to go back to the system at once,
or it would be room for the next test: that is what the threshold of the C library is for.

    MALLOC_MMAP_THRESHOLD_=65536 OMP_NUM_THREADS=1 python -m pytest tests/short_memory.py
"""

from __future__ import annotations

import contextlib
import gc
import resource
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from commandline import tether, write_rows
from faulty import ALWAYS, assert_same_weights, token_budget
from helpers import group
from tether.algorithms import sft
from tether.generation.engine import Engine
from tether.models.loading import load_policy
from tether.models.reward import load_reward_model
from tether.rewards.learned import LearnedReward
from tether.types import Prompt, Sampling, make_requests
from tiny import VOCAB, byte_tokenizer


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def address_space() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@contextlib.contextmanager
def no_more_than(mib: int):
    """Limit this process to ``mib`` MiB more than it has. Beyond that allocations fail, as on a machine without free
    memory."""
    gc.collect()
    held, before = [], address_space()
    while address_space() < before + 2**24:  # memory that earlier tests left in the heap does not count
        held.append(torch.empty(2**21, dtype=torch.uint8))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + mib * 2**20, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A language model and a reward model, small on the disk, whose activations and keys take tens of megabytes."""
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, head_dim=128, max_position_embeddings=2048, initializer_range=0.1,
        bos_token_id=0, eos_token_id=1, pad_token_id=2, num_labels=1,
    )  # fmt: skip
    root = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    for name, kind in (("policy", AutoModelForCausalLM), ("judge", AutoModelForSequenceClassification)):
        kind.from_config(config).save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    return root


@pytest.fixture
def long_texts(here):
    texts = ["".join(chr(97 + (7 * i + k * k) % 26) for k in range(600)) for i in range(8)]
    return write_rows(here / "long.jsonl", [{"text": text} for text in texts])


@pytest.fixture
def limited(monkeypatch):
    """Call a function with a limit on the memory that it may take."""

    @contextlib.contextmanager
    def at(owner, name, mib):
        function = getattr(owner, name)

        def with_limit(*arguments, **options):
            with no_more_than(mib):
                return function(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, with_limit)
            yield

    return at


def test_a_learned_reward_scores_in_smaller_pieces(wide):
    judge, tokenizer = load_reward_model(str(wide / "judge"))
    groups = [group([0], [[3 + (7 * i + k * k) % 250 for k in range(1000)] for i in range(5)])]
    short = LearnedReward("judge", judge, tokenizer, same_vocabulary=True)
    with no_more_than(40):
        (found,) = short.judge(groups)
    assert short.token_budget < 16384
    (expected,) = LearnedReward("judge", judge, tokenizer, same_vocabulary=True).judge(groups)
    assert [one.value for one in found] == pytest.approx([one.value for one in expected], rel=1e-5)


def test_sampling_draws_the_same_with_fewer_completions_at_a_time(wide):
    policy, tokenizer = load_policy(str(wide / "policy"))
    prompts = [Prompt(ids=(0, 5, i), text="p") for i in range(2)]
    asked, sampling = make_requests(prompts, group_size=256, seed=0), Sampling(max_new_tokens=64)
    short = Engine(policy, tokenizer)
    with no_more_than(50):  # keys and values take 128
        found = short.generate(asked, sampling=sampling)
    assert short.budget.max_rows < 512
    assert found == Engine(policy, tokenizer).generate(asked, sampling=sampling)


def test_an_update_computes_the_same_gradient_in_smaller_pieces(here, wide, long_texts, limited):
    """The weights are equal up to rounding."""
    line = f"sft --data long.jsonl --batch-size 8 --epochs 2 --matmul-dtype float32 {ALWAYS} --model {wide}/policy"
    with limited(sft, "update", 120):
        assert tether(f"{line} --out short") == 0
    assert 512 <= token_budget(here / "short") <= 4096
    assert tether(f"{line} --out whole") == 0
    assert token_budget(here / "whole") == 8192
    assert_same_weights(here / "short", here / "whole")


def test_memory_that_is_too_short_for_one_row_is_one_line(here, wide, long_texts, limited, capfd):
    with limited(sft, "update", 1):
        assert tether(f"sft --data long.jsonl {ALWAYS} --model {wide}/policy --out out") == 2
    (complaint,) = capfd.readouterr().err.splitlines()
    assert complaint.startswith("tether sft: out of memory, however little is computed at a time (")
    assert not (here / "out").exists()
