"""A problem small enough to enumerate: every completion, its probability, and the optimum in closed form."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tether.models.policy import completion_logprobs
from tether.types import Batch, RolloutGroup, Score, ScoredGroup

EOS = 1
PROMPT = (0,)


def tiny_llama(vocab: int = 8, *, seed: int = 0) -> PreTrainedModel:
    """Wide enough to represent the optimum: at width 32 even the exact gradient sticks at a distance of 0.04."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=EOS,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@dataclass(frozen=True)
class Space:
    """Every completion of at most ``length`` tokens: all of that length, and shorter ones that end with EOS."""

    completions: tuple[tuple[int, ...], ...]
    masks: tuple[tuple[bool, ...], ...]
    """True where the policy emitted the token."""
    rewards: Tensor  # [n] float64

    @staticmethod
    def of(vocab: int, length: int, *, seed: int, spread: float = 0.5) -> Space:
        """Rewards drawn uniformly from +-spread."""
        found = [
            (ids, (True,) * n)
            for n in range(1, length + 1)
            for ids in itertools.product(range(vocab), repeat=n)
            if EOS not in ids[:-1] and (n == length or ids[-1] == EOS)
        ]
        return Space.with_rewards(found, seed=seed, spread=spread)

    @staticmethod
    def with_rewards(
        trajectories: Sequence[tuple[tuple[int, ...], tuple[bool, ...]]], *, seed: int, spread: float = 0.5
    ) -> Space:
        """Rewards drawn uniformly from +-spread for completions with their masks."""
        generator = torch.Generator().manual_seed(seed)
        rewards = (torch.rand(len(trajectories), generator=generator, dtype=torch.float64) * 2 - 1) * spread
        completions, masks = zip(*trajectories, strict=True)
        return Space(completions, masks, rewards)

    def logprobs(self, model: PreTrainedModel, *, prompt: Sequence[int] = PROMPT) -> Tensor:
        """log pi(completion | prompt) for every completion, [n], with gradient."""
        batch = Batch.collate([(prompt, ids) for ids in self.completions], masks=self.masks)
        (logp,) = completion_logprobs(model, batch, temperature=1.0)
        return logp.sum(1).double()

    def reverse_optimum(self, reference: Tensor, beta: float) -> Tensor:
        """pi_ref exp(r / beta) / Z: maximises E[r] - beta KL(pi || pi_ref)."""
        return (reference + self.rewards / beta).softmax(0)

    def forward_optimum(self, reference: Tensor, beta: float) -> Tensor:
        """beta pi_ref / (lambda - r), lambda > max r by bisection: maximises E[r] - beta KL(pi_ref || pi)."""
        low, high = self.rewards.max(), self.rewards.max() + beta * len(self.rewards)
        for _ in range(200):
            middle = (low + high) / 2
            mass = (beta * reference.exp() / (middle - self.rewards)).sum()
            low, high = (middle, high) if mass > 1 else (low, middle)
        optimum = beta * reference.exp() / (high - self.rewards)
        return optimum / optimum.sum()

    def score(self, groups: list[RolloutGroup]) -> list[ScoredGroup]:
        """The made-up reward, as a Scorer."""
        table = dict(zip(self.completions, self.rewards.tolist(), strict=True))
        return [
            ScoredGroup(rollouts=group, scores=tuple(Score(total=table[c.ids]) for c in group.completions))
            for group in groups
        ]


def total_variation(p: Tensor, q: Tensor) -> float:
    return 0.5 * float((p - q).abs().sum())


LETTERS = {"<s>": 0, "</s>": 1, "<pad>": 2, "a": 3, "b": 4, "c": 5, "d": 6, "e": 7}


def write_problem(directory: Path, space: Space, *, seed: int) -> tuple[int, ...]:
    """``model/`` (eight tokens, a token a word), ``prompts.jsonl`` and ``reward.py:fn`` for the commands; gives the ids
    of the one prompt."""
    tiny_llama(len(LETTERS), seed=seed).save_pretrained(directory / "model")
    core = Tokenizer(models.WordLevel(LETTERS, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(directory / "model")
    (directory / "prompts.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n")
    table = dict(zip(space.completions, space.rewards.tolist(), strict=True))
    (directory / "reward.py").write_text(
        f"TABLE = {table}\ndef fn(completion_ids, **_):\n    return [TABLE[tuple(ids)] for ids in completion_ids]\n"
    )
    return LETTERS["<s>"], LETTERS["a"]
