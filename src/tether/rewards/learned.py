"""A reward model as a reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.data.tokenise import encode_continuation, eos_id
from tether.errors import MemoryShortError, RewardError
from tether.models.loading import context_length, eos_ids
from tether.models.memory import within_memory
from tether.models.reward import normalised_scores, score_sequences
from tether.rewards.combine import Judgement
from tether.rewards.function import as_given
from tether.types import Completion, FinishReason, Prompt, PromptCompletion, RolloutGroup


@dataclass
class LearnedReward:
    """The model's normalised score of prompt and completion, a :class:`tether.rewards.combine.Reward`.

    It reads the policy's own token ids. Only a reward model of another vocabulary (``same_vocabulary`` False) is given
    text, tokenised as its training data was: a conversation goes through the reward model's chat template.

    The score is always read at an EOS. A reward model is trained on sequences that end in one, and its output means
    nothing anywhere else; so a completion that was cut at the length limit or ended by a stop string is closed with the
    reward model's EOS. Penalising a completion for its missing EOS is up to the algorithm.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    same_vocabulary: bool
    token_budget: int = 16384
    """Tokens per micro-batch, halved for good whenever memory runs out; scores change by rounding only."""

    def judge(self, groups: Sequence[RolloutGroup]) -> list[list[Judgement]]:
        rows = [self._row(group.prompt, completion) for group in groups for completion in group.completions]
        longest, limit = max(len(before) + len(after) for before, after in rows), context_length(self.model)
        if longest > limit:
            raise RewardError(
                f"reward {self.name!r}: prompt and completion take {longest} tokens, "
                f"and the reward model reads {limit}",
                hint="lower max_new_tokens, or leave long prompts out",
            )
        try:
            raw, self.token_budget = within_memory(
                lambda budget: score_sequences(self.model, rows, token_budget=budget), self.token_budget
            )
        except MemoryShortError as error:
            error.at(f"reward {self.name!r}")
            error.advise("lower max_new_tokens, or use a smaller reward model")
            raise
        scores = iter(normalised_scores(self.model, raw).tolist())
        return [[Judgement(self._finite(next(scores))) for _ in group.completions] for group in groups]

    def _row(self, prompt: Prompt, completion: Completion) -> PromptCompletion:
        """What the reward model reads: the prompt; the completion and EOS.

        A completion that was cut may fill the policy's context. A reward model of the same context then has no room for
        an EOS, which replaces the last token of the cut text.
        """
        if self.same_vocabulary:
            before, after = list(prompt.ids), list(completion.ids)
            if after[-1] not in eos_ids(self.model, self.tokenizer):
                after.append(eos_id(self.tokenizer))
        else:
            before, after = encode_continuation(
                self.tokenizer, prompt.messages or prompt.text, as_given(prompt, completion)
            )
        if (
            len(before) + len(after) == context_length(self.model) + 1
            and completion.finish_reason is not FinishReason.EOS
        ):
            del after[-2:-1]
        return before, after

    def _finite(self, score: float) -> float:
        if not math.isfinite(score):
            raise RewardError(f"reward {self.name!r}: the reward model gave {score}", hint="its weights are not usable")
        return score
