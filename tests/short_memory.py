"""Memory that really is short: limits on the address space of this process, which :mod:`test_faults` makes for it,
because a library that has once failed to get memory may remember that. What is freed has to go back to the system at
once, or it would be room for the next test: that is what the threshold of the C library is for.

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
from conftest import VOCAB, byte_tokenizer
from helpers import group
from test_faults import ALWAYS, assert_same_weights, token_budget
from tether.algorithms import sft
from tether.generation.engine import Engine
from tether.models.loading import load_policy
from tether.models.reward import load_reward_model
from tether.rewards.learned import LearnedReward
from tether.types import Prompt, Sampling


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def address_space() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@contextlib.contextmanager
def no_more_than(mib: int):
    """Let this process take ``mib`` MiB more than it has, and no more: from there on allocations fail, as they do on a
    machine whose memory has run out."""
    gc.collect()
    held, before = [], address_space()
    while address_space() < before + 2**24:  # what others have left in the heap does not count
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
    """Call a function with no more than so much memory."""

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


def test_memory_that_is_short_in_a_learned_reward(wide):
    judge, tokenizer = load_reward_model(str(wide / "judge"))
    groups = [group([0], [[3 + (7 * i + k * k) % 250 for k in range(1000)] for i in range(5)])]
    short = LearnedReward("judge", judge, tokenizer, same_vocabulary=True)
    with no_more_than(40):
        (found,) = short.values(groups)
    assert short.token_budget < 16384
    (expected,) = LearnedReward("judge", judge, tokenizer, same_vocabulary=True).values(groups)
    assert found == pytest.approx(expected, rel=1e-5)


def test_memory_that_is_short_in_sampling(wide):
    policy, tokenizer = load_policy(str(wide / "policy"))
    prompts = [Prompt(ids=(0, 5, i), text="p") for i in range(2)]
    options = {"group_size": 256, "sampling": Sampling(max_new_tokens=64), "seed": 0}
    short = Engine(policy, tokenizer)
    with no_more_than(50):  # keys and values take 128
        found = short.generate(prompts, **options)
    assert short.budget.max_rows < 512
    assert found == Engine(policy, tokenizer).generate(prompts, **options)


def test_memory_that_is_short_in_an_update(here, wide, long_texts, limited):
    """The gradient is the same in smaller pieces, and so are the weights, up to rounding."""
    line = f"sft --data long.jsonl --batch-size 8 --epochs 2 --products float32 {ALWAYS} --model {wide}/policy"
    with limited(sft, "update", 120):
        assert tether(f"{line} --out short") == 0
    assert 512 <= token_budget(here / "short") <= 4096
    assert tether(f"{line} --out whole") == 0
    assert token_budget(here / "whole") == 8192
    assert_same_weights(here / "short", here / "whole")


def test_memory_that_is_short_whatever_is_done(here, wide, long_texts, limited, capfd):
    with limited(sft, "update", 1):
        assert tether(f"sft --data long.jsonl {ALWAYS} --model {wide}/policy --out out") == 2
    (complaint,) = capfd.readouterr().err.splitlines()
    assert complaint.startswith("tether sft: out of memory, however little is computed at a time (")
    assert not (here / "out").exists()
