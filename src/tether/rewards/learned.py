"""A reward model as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.data.tokenise import encode_continuation, eos_id
from tether.errors import MemoryShortError, RewardError
from tether.models.loading import context_length, eos_ids
from tether.models.memory import within_memory
from tether.models.reward import normalised_scores, score_sequences
from tether.rewards.combine import RewardValue
from tether.rewards.function import as_given
from tether.types import Completion, Finish, Prompt, RolloutGroup, Row


@dataclass
class LearnedReward:
    """The model's normalised score of prompt and completion, a :class:`tether.rewards.combine.Reward`.

    It reads the policy's own token ids. Only a reward model of another vocabulary (``same_vocabulary`` False) is given
    text, tokenised as its own training data was: a conversation goes through its own chat template.

    The score is always read at an EOS. A reward model is trained on sequences that end in one, and says nothing
    meaningful anywhere else; so a completion that was cut at the length limit or ended by a stop string is closed with
    the reward model's EOS. That a completion has no EOS of its own is for the algorithm to charge, not for the score.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    same_vocabulary: bool
    token_budget: int = 16384
    """Tokens of a micro-batch; it is halved where memory runs out, and stays so. Scores are the same up to rounding."""

    def values(self, groups: Sequence[RolloutGroup]) -> list[list[RewardValue]]:
        rows = [self._row(group.prompt, completion) for group in groups for completion in group.completions]
        longest, limit = max(len(before) + len(after) for before, after in rows), context_length(self.model)
        if longest > limit:
            raise RewardError(
                f"reward {self.name!r}: prompt and completion take {longest} tokens, and the reward model reads "
                f"{limit}; lower max_new_tokens, or leave long prompts out"
            )
        try:
            raw, self.token_budget = within_memory(
                lambda budget: score_sequences(self.model, rows, token_budget=budget), self.token_budget
            )
        except MemoryShortError as error:
            raise RewardError(
                f"reward {self.name!r}: {error}; lower max_new_tokens, or take a smaller reward model"
            ) from error
        scores = iter(normalised_scores(self.model, raw).tolist())
        return [[self._finite(next(scores)) for _ in group.completions] for group in groups]

    def _row(self, prompt: Prompt, completion: Completion) -> Row:
        """What the reward model reads: the prompt; the completion and EOS.

        A policy may fill its context with a completion that it cuts; in a reward model of the same context there is
        then no room for an EOS, and the last token of the cut text gives way to it.
        """
        if self.same_vocabulary:
            before, after = list(prompt.ids), list(completion.ids)
            if after[-1] not in eos_ids(self.model, self.tokenizer):
                after.append(eos_id(self.tokenizer))
        else:
            before, after = encode_continuation(
                self.tokenizer, prompt.messages or prompt.text, as_given(prompt, completion)
            )
        if len(before) + len(after) == context_length(self.model) + 1 and completion.finish is not Finish.EOS:
            del after[-2:-1]
        return before, after

    def _finite(self, score: float) -> RewardValue:
        if score != score or score in (float("inf"), float("-inf")):
            raise RewardError(f"reward {self.name!r}: the reward model gave {score}; its weights are not usable")
        return score
