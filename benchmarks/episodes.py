"""Episodes of several turns: the engine, which keeps their cache, beside transformers.generate, which begins again.

    python -m benchmarks.episodes [--episodes 32] [--turns 6] [--turn-tokens 8] [--shown 24] [--rounds 3]

The embedded model plays with an environment that shows a text of ``--shown`` tokens after each turn of
``--turn-tokens``. The other side is the loop that one writes with transformers: pad the conversations on the left,
generate a turn, append what is shown, and begin again. Both sample as many tokens; sides alternate, and the median of
the ratios of their times is printed, with the tokens that each ran through the model.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tether.data.tokenise import following_ids
from tether.generation.engine import Engine
from tether.generation.environment import Observation
from tether.generation.episodes import Episodes
from tether.models.loading import eos_ids, load_policy
from tether.types import Prompt, Sampling, make_requests

OPENING = "The king said to the old man who stood before the gate of the city:"
WORDS = " And the people of the city heard the words and went to the house of the king, and they saw it."


class Narrator:
    """Shows the same text after every turn."""

    def __init__(self, text: str) -> None:
        self.text = text

    def reset(self, prompt: Prompt, *, seed: int) -> Observation:  # noqa: ARG002
        return Observation()

    def step(self, action: str) -> Observation:  # noqa: ARG002
        return Observation(text=self.text)


def counting(model: PreTrainedModel) -> list[int]:
    """A list that gets the number of tokens of each pass of the model."""
    passes: list[int] = []
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Module)
    embeddings.register_forward_hook(lambda _module, given, _result: passes.append(given[0].numel()))
    return passes


def ours(engine: Engine, prompt: Prompt, episodes: int, sampling: Sampling) -> int:
    """Tokens that the policy emitted."""
    groups = engine.generate(make_requests([prompt], group_size=episodes, seed=0), sampling=sampling)
    return sum(sum(completion.mask) for group in groups for completion in group.completions)


@torch.no_grad()
def theirs(
    model: PreTrainedModel, prompt: Prompt, episodes: int, shown: list[int], *, turns: int, turn_tokens: int, pad: int
) -> int:
    """The same with transformers.generate, turn by turn, all conversations in one batch."""
    rows = [list(prompt.ids)] * episodes
    emitted = 0
    for turn in range(turns):
        longest = max(map(len, rows))
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        found = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, max_new_tokens=turn_tokens,
            min_new_tokens=turn_tokens, pad_token_id=pad,
        )  # fmt: skip
        new = found[:, longest:].tolist()
        emitted += sum(map(len, new))
        rows = [row + own + (shown if turn + 1 < turns else []) for row, own in zip(rows, new, strict=True)]
    return emitted


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """A text that has this many tokens behind another."""
    ids = following_ids(tokenizer, WORDS * (1 + tokens // 20))[:tokens]
    text = str(tokenizer.decode(ids))
    assert len(following_ids(tokenizer, text)) == tokens
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"episodes": 32, "turns": 6, "turn-tokens": 8, "shown": 24, "rounds": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    model, tokenizer = load_policy("base")
    text = text_of(tokenizer, args.shown)
    shown = following_ids(tokenizer, text)
    ids = tuple(tokenizer(OPENING)["input_ids"])
    prompt = Prompt(ids=ids, text=OPENING)
    longest = args.turns * args.turn_tokens + (args.turns - 1) * args.shown
    sampling = Sampling(max_new_tokens=longest, min_new_tokens=longest)  # no turn ends before its limit
    limits = Episodes(make=lambda: Narrator(text), max_turns=args.turns, turn_tokens=args.turn_tokens)
    engine = Engine(model, tokenizer, episodes=limits)
    passes = counting(model)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_ids(model, tokenizer)[0]
    times: dict[str, list[float]] = {"engine": [], "generate": []}
    ran: dict[str, int] = {}
    for _ in range(args.rounds + 1):  # the first is to warm up
        for side in times:
            passes.clear()
            begun = time.perf_counter()
            if side == "engine":
                emitted = ours(engine, prompt, args.episodes, sampling)
            else:
                emitted = theirs(
                    model, prompt, args.episodes, shown, turns=args.turns, turn_tokens=args.turn_tokens, pad=int(pad)
                )
            times[side].append(time.perf_counter() - begun)
            tally = engine.tally  # a pass of the engine may have fillers, which a pass of generate calls padding
            done = tally.prompt_tokens + tally.shown_tokens + tally.row_steps
            ran[side] = done if side == "engine" else sum(passes)
            assert emitted == args.episodes * args.turns * args.turn_tokens, (side, emitted)
    new = len(ids) + args.episodes * (longest - 1)  # one prompt for all; the last token goes through no layer
    assert ran["engine"] == new, (ran, new)
    for side, found in times.items():
        print(f"{side:9} {statistics.median(found[1:]):7.3f} s  {ran[side]:8} tokens run")
    ratios = [b / a for a, b in zip(times["engine"][1:], times["generate"][1:], strict=True)]
    print(f"new tokens {new}; generate / engine: {statistics.median(ratios):.2f} (median of {args.rounds})")


if __name__ == "__main__":
    main()
