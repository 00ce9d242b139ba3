"""A reward model as a reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.data.conversations import PLAIN, template_of
from tether.data.encoding import Encoder
from tether.data.tokenise import Text, continuation_ids, encode, eos_id, render, write_continuation
from tether.errors import MemoryShortError, RewardError
from tether.models.loading import context_length, embedding_rows, eos_ids
from tether.models.memory import within_memory
from tether.models.reward import normalised_scores, score_sequences
from tether.rewards.combine import Judgement, flattened, regrouped
from tether.rewards.function import as_given
from tether.rewards.signature import PROBE, special_texts
from tether.types import Completion, FinishReason, Prompt, PromptCompletion, RolloutGroup


@dataclass
class LearnedReward:
    """The model's normalised score of prompt and completion, a :class:`tether.rewards.combine.Reward`.

    It reads the policy's own token ids where its tokenizer would give the same ones. Otherwise it is given text,
    tokenised as its training data was: a conversation goes through the reward model's chat template.

    The score is always read at an EOS. A reward model is trained on sequences that end in one, and its output means
    nothing anywhere else; so a completion that was cut at the length limit or ended by a stop string is closed with the
    reward model's EOS. Penalising a completion for its missing EOS is up to the algorithm.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    same_vocabulary: bool
    """Whether every token of the policy has the same id here."""
    same_text: bool = True
    """Whether plain text has the policy's ids where the vocabulary is the same: BOS, EOS and merges agree."""
    same_conversations: bool = True
    """Whether conversations have them: the chat template, its special tokens and EOS agree."""
    token_budget: int = 16384
    """Tokens per micro-batch, halved for good whenever memory runs out; scores change by rounding only."""

    @staticmethod
    def of(
        name: str, model: PreTrainedModel, own: PreTrainedTokenizerBase, policy: PreTrainedTokenizerBase
    ) -> LearnedReward:
        """The reward of a model with the tokenizer ``own``, for completions of one with the tokenizer ``policy``."""
        ends_alike = own.eos_token_id == policy.eos_token_id
        rendered_alike = own.chat_template == policy.chat_template and special_texts(own) == special_texts(policy)
        return LearnedReward(
            name,
            model,
            own,
            same_vocabulary=own.get_vocab().items() >= policy.get_vocab().items(),
            same_text=ends_alike and encode(own, PROBE) == encode(policy, PROBE),
            same_conversations=ends_alike and rendered_alike,
        )

    def reads_ids(self, prompt: Prompt) -> bool:
        """Whether the policy's ids of ``prompt`` and its completions are those of this tokenizer."""
        return self.same_vocabulary and (self.same_conversations if prompt.messages else self.same_text)

    def rendered(self, prompt: Prompt) -> str:
        """The prompt's text, as the reward model's chat template writes a conversation. Raises :class:`DataError`."""
        if prompt.messages is None:
            return prompt.text
        return render(self.tokenizer, prompt.messages, open_turn=True, template=template_of(prompt.columns))

    def length_around(self, prompt: Prompt) -> int:
        """Tokens of a prompt in the reward model's own rendering, with those that close a completion (its EOS)."""
        completion = [{"role": "assistant", "content": "x"}] if prompt.messages else "x"
        before, after = self._own_ids(prompt, completion)
        return len(before) + len(after) - 1

    def _own_ids(self, prompt: Prompt, completion: Text) -> PromptCompletion:
        """Prompt and completion as this tokenizer and its chat template give them."""
        given, template = (prompt.messages, template_of(prompt.columns)) if prompt.messages else (prompt.text, PLAIN)
        written = write_continuation(self.tokenizer, given, completion, template)
        return continuation_ids(Encoder(self.tokenizer), written)

    def judge(self, groups: Sequence[RolloutGroup]) -> list[list[Judgement]]:
        rows = [self.row(prompt, completion) for prompt, completion in flattened(groups)]
        self.require_room(rows)
        return regrouped([Judgement(score) for score in self.scores(rows)], groups)

    def require_room(self, rows: Sequence[PromptCompletion]) -> None:
        """Raise :class:`RewardError` where a row is longer than the model's context."""
        longest, limit = max(len(before) + len(after) for before, after in rows), context_length(self.model)
        if longest > limit:
            raise RewardError(
                f"reward {self.name!r}: prompt and completion take {longest} tokens, "
                f"and the reward model reads {limit}",
                hint="lower max_new_tokens, or leave long prompts out",
            )

    def scores(self, rows: Sequence[PromptCompletion]) -> list[float]:
        """The normalised score of each row."""
        try:
            raw, self.token_budget = within_memory(
                lambda budget: score_sequences(self.model, rows, token_budget=budget), self.token_budget
            )
        except MemoryShortError as error:
            error.at(f"reward {self.name!r}")
            error.advise("lower max_new_tokens, or use a smaller reward model")
            raise
        return [self._finite(score) for score in normalised_scores(self.model, raw).tolist()]

    def row(self, prompt: Prompt, completion: Completion) -> PromptCompletion:
        """What the reward model reads: the prompt; the completion and EOS.

        A completion that was cut may fill the policy's context. A reward model of the same context then has no room for
        an EOS, which replaces the last token of the cut text. A policy may emit ids beyond its vocabulary, for which
        the reward model has no embedding: the completion's text is then read.
        """
        if self.reads_ids(prompt) and max(*prompt.ids, *completion.ids) < embedding_rows(self.model):
            before, after = list(prompt.ids), list(completion.ids)
            if after[-1] not in eos_ids(self.model, self.tokenizer):
                after.append(eos_id(self.tokenizer))
        else:
            own = self._own_ids(prompt, as_given(prompt, completion))
            before, after = list(own[0]), list(own[1])
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
