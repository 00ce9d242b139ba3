"""``tether chat``: talk to a model, or to two beside each other."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tether.config import DeviceOptions, unrounded
from tether.data.chat import Chat as ChatOptions
from tether.data.chat import choose_template, with_system
from tether.data.conversations import Template
from tether.data.encoding import Encoder
from tether.data.tokenise import write_prompt
from tether.errors import ConfigError, RunError, TetherError
from tether.flags import POSITIONAL
from tether.generation.engine import Engine
from tether.looking.terminal import show
from tether.models.loading import context_length
from tether.seeds import derive_seed
from tether.training.inputs import naming_the_model_of_a_run
from tether.training.loading import load_model
from tether.types import Message, Prompt, Request, Sampling
from tether.untrusted import lines_printable, one_line, printable

HELP = "/reset forgets the conversation, /seed N draws other replies, /quit ends"


def long_replies() -> Sampling:
    """Replies have more room than completions in training."""
    return Sampling(max_new_tokens=256)


@dataclass(frozen=True, kw_only=True)
class Chat:
    """Talk to a model. One with a chat template answers; another continues what was written so far. /reset forgets the
    conversation, /seed N draws other replies, /quit or the end of the input ends."""

    model: str = field(metadata={POSITIONAL: "MODEL"})
    """Model to talk to: a directory, a hub id or 'base'."""
    against: str | None = None
    """Another model, which is told the same and draws with the same seeds; each has a conversation of its own."""
    seed: int = 0
    """Seed of the replies: the same seed and the same words give the same replies."""
    conversation: ChatOptions = field(default_factory=ChatOptions)
    device: DeviceOptions = field(default_factory=unrounded)
    sampling: Sampling = field(default_factory=long_replies)

    def __post_init__(self) -> None:
        ConfigError.unless_typed(self)


@dataclass(kw_only=True)
class Conversation:
    """What was said to one model, and what it replied."""

    name: str
    model: Any
    tokenizer: Any
    engine: Engine
    options: ChatOptions = field(default_factory=ChatOptions)
    turns: list[Message] = field(default_factory=list)
    """In turns, for a model with a chat template."""
    text: str = ""
    """In one piece, for a model without."""

    @staticmethod
    def of(name: str, device: DeviceOptions, options: ChatOptions | None = None) -> Conversation:
        """A new conversation with the model called ``name``."""
        model, tokenizer, _ = load_model(name, device)
        options = options or ChatOptions()
        choose_template(tokenizer, options.chat_template)
        if (options.system is not None or options.options) and not tokenizer.chat_template:
            raise ConfigError("the model has no chat template", where=name, hint="give one by --chat-template")
        return Conversation(
            name=name, model=model, tokenizer=tokenizer, engine=Engine(model, tokenizer), options=options
        )

    def reset(self) -> None:
        self.turns, self.text = [], ""

    def reply(self, said: str, *, sampling: Sampling, seed: int) -> str:
        """The reply to ``said``, after all that was said before. Raises :class:`TetherError`, and forgets ``said``,
        where there is no room for one or the chat template refuses it."""
        templated = bool(self.tokenizer.chat_template)
        turns: list[Message] = [*self.turns, {"role": "user", "content": said}]
        told = turns if self.options.system is None else with_system(turns, self.options.system)
        asked: Any = told if templated else self.text + said
        written = write_prompt(self.tokenizer, asked, Template(options=self.options.options))
        ids = tuple(Encoder(self.tokenizer)(written))
        context = context_length(self.model)
        room = context - len(ids)
        if not ids or room < 1:
            what = f"takes {len(ids)} tokens, and the model's context is {context}" if ids else "is empty"
            raise RunError(f"the conversation {what}", where=self.name, hint="begin a new one with /reset")
        prompt = Prompt(ids=ids, text=written.text)
        limits = replace(
            sampling,
            max_new_tokens=min(sampling.max_new_tokens, room),
            min_new_tokens=min(sampling.min_new_tokens, room),
        )
        (group,) = self.engine.generate([Request(prompt=prompt, seeds=(seed,))], sampling=limits)
        answer = group.completions[0].text
        if templated:
            self.turns = [*turns, {"role": "assistant", "content": answer}]
        else:
            self.text = asked + answer
        return answer


@naming_the_model_of_a_run()
def main(command: Chat) -> None:
    names = [command.model, *([command.against] if command.against is not None else [])]
    found = [Conversation.of(name, command.device, command.conversation) for name in names]
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no text become U+FFFD, which a tokenizer takes
    if sys.stdin.isatty():
        tell(HELP)
    talk(found, lines(), sampling=command.sampling, seed=command.seed)


def lines() -> Iterator[str]:
    """What a person types, up to the end of the input; a terminal shows a prompt."""
    while True:
        try:
            yield input("> ") if sys.stdin.isatty() else input()
        except EOFError:
            return


def talk(found: Sequence[Conversation], said: Iterator[str], *, sampling: Sampling, seed: int) -> None:
    """Answer each line. Line n is answered with the seed ``derive_seed(seed, "chat", n)``, n from 0 and anew after
    /reset and /seed."""
    number = 0
    for line in said:
        word, _, rest = line.strip().partition(" ")
        if not word:
            continue
        if word == "/quit":
            return
        if word == "/reset":
            number = 0
            for one in found:
                one.reset()
        elif word == "/seed" and re.fullmatch(r"\s*-?[0-9]{1,18}\s*", rest):
            number, seed = 0, int(rest)
        elif word.startswith("/"):
            tell(f"{line.strip()!r} is no command: {HELP}")
        else:
            answer_all(found, line, sampling=sampling, seed=derive_seed(seed, "chat", number))
            number += 1


def answer_all(found: Sequence[Conversation], said: str, *, sampling: Sampling, seed: int) -> None:
    """Print the reply of each model to ``said``, under its name where there are two. An error or an interruption costs
    the reply, not the conversation."""
    for one in found:
        try:
            answer = lines_printable(one.reply(said, sampling=sampling, seed=seed))
        except TetherError as error:
            tell(str(error))
        except KeyboardInterrupt:
            tell("stopped")
        else:
            show(f"[{printable(one.name)}]\n{answer}\n" if len(found) > 1 else answer)


def tell(text: str) -> None:
    """A remark that is no reply."""
    print(f"({one_line(text)})", file=sys.stderr, flush=True)
