"""A reward model as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.data.tokenise import encode
from tether.errors import RewardError
from tether.models.loading import context_length
from tether.models.reward import normalised_scores, score_sequences
from tether.rewards.combine import RewardValue
from tether.types import RolloutGroup


@dataclass(frozen=True)
class LearnedReward:
    """The model's normalised score of prompt and completion, a :class:`tether.rewards.combine.Reward`.

    It reads the policy's own token ids. Only a reward model of another vocabulary (``same_vocabulary`` False) is given
    re-tokenised text, with its own EOS in place of the policy's.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    same_vocabulary: bool
    token_budget: int = 16384

    def values(self, groups: Sequence[RolloutGroup]) -> list[list[RewardValue]]:
        sequences = [self._sequence(group, j) for group in groups for j in range(len(group.completions))]
        longest, limit = max(map(len, sequences)), context_length(self.model)
        if longest > limit:
            raise RewardError(
                f"reward {self.name!r}: a completion takes {longest} tokens and the reward model reads {limit}"
            )
        raw = score_sequences(self.model, sequences, token_budget=self.token_budget)
        scores = iter(normalised_scores(self.model, raw).tolist())
        return [[self._finite(next(scores)) for _ in group.completions] for group in groups]

    def _sequence(self, group: RolloutGroup, index: int) -> list[int]:
        completion = group.completions[index]
        if self.same_vocabulary:
            return [*group.prompt.ids, *completion.ids]
        ids = encode(self.tokenizer, group.prompt.text + completion.text)
        return [*ids, self.tokenizer.eos_token_id] if completion.finish == "eos" else ids

    def _finite(self, score: float) -> RewardValue:
        if score != score or score in (float("inf"), float("-inf")):
            raise RewardError(f"reward {self.name!r}: the reward model gave {score}; its weights are not usable")
        return score
