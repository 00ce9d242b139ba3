"""Episodes: the engine plays what the oracle plays, runs every token once, and waits for no environment in vain."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from functools import partial

import pytest
import torch

from tether.data.tokenise import encode_prompt
from tether.errors import EpisodeError
from tether.generation import cache
from tether.generation.engine import Engine
from tether.generation.environment import Observation
from tether.generation.episodes import Episodes
from tether.generation.naive import NaiveGenerator
from tether.generation.rows import InFlight, arranged
from tether.models.loading import load_policy
from tether.models.policy import completion_logprobs
from tether.types import Batch, Budget, FinishReason, Prompt, Sampling, make_requests
from tiny import make_model

PROMPTS = [Prompt(ids=(0, 5, 6, 7, 8, 9), text="abc"), Prompt(ids=(0, 70), text="d"), Prompt(ids=(0, 7) * 5, text="e")]
SAMPLING = Sampling(max_new_tokens=40)
CHAT = Prompt(ids=(), text="", messages=({"role": "user", "content": "Guess."},))


class Talk:
    """Shows texts of many lengths, none among them, and ends when the policy said something with a long hash."""

    def reset(self, prompt, *, seed):
        self.turn, self.seed = 0, seed
        return Observation(text=f"[{seed % 7}]" if prompt.text != "d" else "")

    def step(self, action):
        self.turn += 1
        number = sum(action.encode()) + 31 * self.turn
        text = ("", "x", " go on", " and what then?")[number % 4]
        return Observation(text=text, reward=number % 5 - 1.5, done=number % 6 == 0, info={"turn": self.turn})


class Slow(Talk):
    def step(self, action):
        time.sleep(random.Random(action).random() * 0.03)
        return super().step(action)


class Async(Talk):
    async def reset(self, prompt, *, seed):
        return super().reset(prompt, seed=seed)

    async def step(self, action):
        await asyncio.sleep(random.Random(action).random() * 0.03)
        return super().step(action)


def played(kind, tiny, *, make=Talk, prompts=PROMPTS, group_size=3, sampling=SAMPLING, budget=None, eos=1.0, **limits):
    model, tokenizer = load_policy(tiny)
    with torch.no_grad():
        model.get_output_embeddings().weight[tokenizer.eos_token_id] *= eos
    episodes = Episodes(make=make, **({"turn_tokens": 5} | limits))
    more = {"budget": budget} if kind is Engine else {}
    generator = kind(model, tokenizer, episodes=episodes, **more)
    return generator.generate(make_requests(prompts, group_size=group_size, seed=3), sampling=sampling), generator


def said(groups):
    """All of the episodes but their log-probs."""
    return [
        (g.prompt, [(c.ids, c.mask, c.finish_reason, c.text, c.turns, c.messages) for c in g.completions])
        for g in groups
    ]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "gemma2", "mistral"])
def test_the_engine_plays_what_the_oracle_plays(architecture, tiny_models):
    """Of mistral and gemma2 the windows are shorter than the episodes."""
    ours, _ = played(Engine, tiny_models[architecture])
    theirs, _ = played(NaiveGenerator, tiny_models[architecture])
    assert said(ours) == said(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(one.completions, other.completions, strict=True):
            assert a.sampler_logp == pytest.approx(b.sampler_logp, abs=1e-4)
    completions = [c for g in ours for c in g.completions]
    assert {c.finish_reason for c in completions} == {FinishReason.DONE, FinishReason.LENGTH}
    assert max(len(c.turns) for c in completions) > 3
    for c in completions:
        assert c.mask[-1]
        spans = [i for turn in c.turns for i in range(turn.start, turn.stop)]
        assert spans == [i for i, own in enumerate(c.mask) if own]
        assert all(logp == 0 for logp, own in zip(c.sampler_logp, c.mask, strict=True) if not own)


@pytest.mark.parametrize("make", [Slow, Async], ids=["slow", "async"])
@pytest.mark.parametrize("budget", [Budget(), Budget(max_rows=1), Budget(max_rows=4)], ids=["all", "one", "four"])
def test_episodes_do_not_depend_on_the_batch_nor_on_who_answers_first(make, budget, tiny):
    """Bit by bit."""
    assert played(Engine, tiny, make=make, budget=budget)[0] == played(Engine, tiny)[0]


def test_each_episode_is_the_same_alone(tiny):
    together, engine = played(Engine, tiny)
    for request, group in zip(make_requests(PROMPTS, group_size=3, seed=3), together, strict=True):
        for seed, completion in zip(request.seeds, group.completions, strict=True):
            # the environment's seed is that of its group, whose first seed begins the request
            alone = engine.generate([type(request)(prompt=request.prompt, seeds=(request.seeds[0], seed))],
                                    sampling=SAMPLING)  # fmt: skip
            assert alone[0].completions[1] == completion


def test_log_probs_are_those_of_the_training_pass(tiny):
    groups, engine = played(Engine, tiny)
    rows = [(g.prompt, c) for g in groups for c in g.completions]
    batch = Batch.collate([(p.ids, c.ids) for p, c in rows], masks=[c.mask for _, c in rows])
    with torch.no_grad():
        (logp,) = completion_logprobs(engine.model, batch, temperature=1.0)
    for row, (_, completion) in zip(logp, rows, strict=True):
        assert row[: len(completion.ids)].tolist() == pytest.approx(completion.sampler_logp, abs=1e-4)


def test_every_token_is_run_once(tiny, monkeypatch):
    """Prompts once for their group, and of each episode every token but the last, which nothing follows."""
    model, tokenizer = load_policy(tiny)
    engine = Engine(model, tokenizer, episodes=Episodes(make=Talk, turn_tokens=5))
    ran = []
    for kind in (cache.PrefillLayout, cache.DecodeLayout):
        attend = kind.attend

        def counting(self, layer, q, k, v, attend=attend):
            if layer.index == 0:
                real = sum(n for *_, n in self.spans) if hasattr(self, "spans") else self.shape.rows * self.new
                ran.append(real)
            return attend(self, layer, q, k, v)

        monkeypatch.setattr(kind, "attend", counting)
    groups = engine.generate(make_requests(PROMPTS, group_size=4, seed=3), sampling=SAMPLING)
    prompts = sum(len(g.prompt.ids) for g in groups)
    assert sum(ran) == prompts + sum(len(c.ids) - 1 for g in groups for c in g.completions)
    tally = engine.tally
    assert tally.prompt_tokens == prompts
    shown = [c.mask.count(False) for g in groups for c in g.completions]
    assert tally.shown_tokens == sum(shown) > 0
    assert tally.new_tokens == sum(c.mask.count(True) for g in groups for c in g.completions)


def test_others_are_sampled_while_an_environment_thinks(tiny):
    """One episode's environment answers only once all others are over."""
    done, lock = [], threading.Lock()
    release = threading.Event()

    class Held(Talk):
        def reset(self, prompt, *, seed):
            self.held = prompt.text == "d"
            return super().reset(prompt, seed=seed)

        def step(self, action):
            if self.held and not release.wait(20):
                raise TimeoutError
            found = super().step(action)
            with lock:
                if found.done or self.turn == 4:
                    done.append(self.held)
                if done.count(False) == 6:
                    release.set()
            return found

    groups, _ = played(Engine, tiny, make=Held, max_turns=4, budget=Budget(max_rows=5))
    assert said(groups) == said(played(Engine, tiny, max_turns=4)[0])
    assert done[:6] == [False] * 6


class Guessing(Talk):
    def step(self, action):
        found = super().step(action)
        if self.turn % 2:
            return found
        answer = ({"role": "tool", "content": "5"}, {"role": "user", "content": "and?"})
        return Observation(text=answer, reward=found.reward, done=found.done)


def test_a_conversation_goes_on_as_its_template_writes_it(tmp_path):
    directory = make_model(tmp_path / "chat", template=True)
    tokenizer = load_policy(directory)[1]
    prompts = [Prompt(ids=tuple(encode_prompt(tokenizer, CHAT.messages)), text="", messages=CHAT.messages)]
    options = {"make": Guessing, "prompts": prompts, "group_size": 8, "eos": 3.0}
    ours, _ = played(Engine, directory, **options)
    assert said(ours) == said(played(NaiveGenerator, directory, **options)[0])
    (group,) = ours
    (first,) = group.prompt.messages[1:]
    assert first["role"] == "user"
    assert list(group.prompt.ids) == encode_prompt(tokenizer, group.prompt.messages)
    endings = set()
    for completion in group.completions:
        replies = iter(completion.messages)
        for turn, after in itertools.pairwise(completion.turns):
            assert next(replies)["role"] == "assistant"
            ended = completion.ids[turn.stop - 1] == tokenizer.eos_token_id
            endings.add(ended)
            between = tokenizer.decode(completion.ids[turn.stop : after.start], skip_special_tokens=False)
            written = "" if ended else "</s>"
            written += "\n"
            while written.count("[") < between.count("[") - 1:
                reply = next(replies)
                written += f"[{reply['role']}]{reply['content']}"
            assert between == written + "[assistant]"
        assert [reply["role"] for reply in replies] == ["assistant"]
    assert endings == {True, False}


def test_limits(tiny):
    groups, _ = played(Engine, tiny, max_turns=2)
    assert max(len(c.turns) for g in groups for c in g.completions) == 2
    groups, _ = played(Engine, tiny, sampling=Sampling(max_new_tokens=12), turn_tokens=None)
    for c in (c for g in groups for c in g.completions):
        assert len(c.ids) <= 12
        assert c.finish_reason in (FinishReason.DONE, FinishReason.LENGTH)
    groups, _ = played(Engine, tiny, make=Slow, seconds=1e-9)
    assert {len(c.turns) for g in groups for c in g.completions} == {1}


def test_stop_strings_end_a_turn(tiny):
    sampling = Sampling(max_new_tokens=40, stop=("a", "e", "i"))
    ours, _ = played(Engine, tiny, sampling=sampling, turn_tokens=8)
    theirs, _ = played(NaiveGenerator, tiny, sampling=sampling, turn_tokens=8)
    assert said(ours) == said(theirs)


class Fails(Talk):
    def __init__(self, how):
        self.how = how

    def reset(self, prompt, *, seed):
        if self.how == "reset":
            raise KeyError("x")
        if self.how == "other":
            return Observation(text=str(id(self)))
        return Observation(done=self.how == "done")

    def step(self, action):
        match self.how:
            case "step":
                raise ValueError("no such room")
            case "text":
                return "what?"
            case "nan":
                return Observation(reward=float("nan"))
            case "info":
                return Observation(info={"steps": "many"})
            case "turns":
                return Observation(text=[{"role": "user", "content": "x"}])
            case "hangs":
                time.sleep(5)
        return Observation()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("reset", "it raised an error: KeyError: 'x'"),
        ("other", "a reset with the same prompt and seed showed something else"),
        ("done", "the episode is over before its first turn"),
        ("step", "it raised an error: ValueError: no such room"),
        ("text", "it returned 'what\\?', which is no Observation"),
        ("nan", "its reward is nan, which is no finite number"),
        ("info", "its info 'steps' is 'many', which is no finite number"),
        ("turns", "messages were shown in a text that is no conversation"),
        ("hangs", "it did not answer within 0.2 s; raise the deadline"),
    ],
)
def test_an_environment_that_fails_is_an_error(how, message, tiny):
    began = time.monotonic()
    with pytest.raises(EpisodeError, match=f"maze: {message}"):
        played(Engine, tiny, make=partial(Fails, how), name="maze", deadline=0.2)
    assert time.monotonic() - began < 4
    left = [thread for thread in threading.enumerate() if thread.name == "tether-environment"]
    assert left or how != "hangs"
    assert all(thread.daemon for thread in left)


def test_an_environment_that_cannot_be_made(tiny):
    with pytest.raises(EpisodeError, match="env: it could not be made: TypeError"):
        played(Engine, tiny, make=Fails)


def test_a_prompt_that_a_reset_makes_too_long(tiny):
    class Long(Talk):
        def reset(self, prompt, *, seed):
            return Observation(text="x" * 200)

    with pytest.raises(EpisodeError, match="the prompt has 206 tokens with what the reset shows"):
        played(Engine, tiny, make=Long)


def test_rows_keep_their_places_where_they_can():
    rows = [InFlight(request=0, seed=i, job=i) for i in range(6)]
    a, b, c, d, e, f = rows
    active, aside, targets, sources = arranged([a, b, c, d, e], [a, d, e], [b, f])
    assert active == [a, d, e]
    assert aside == [b, f] or aside == [f, b]
    assert dict(zip(targets, sources, strict=True))[1] in (3, 4)
    places = dict(enumerate([a, b, c, d, e]))
    for target, source in zip(targets, sources, strict=True):
        assert [*active, *aside][target] is places[source]
    assert arranged([a, b, c], [a, b, c], []) == ([a, b, c], [], [], [])
    assert arranged([], [a, b], []) == ([a, b], [], [], [])
    assert arranged([a, b, c, d], [a, b], []) == ([a, b], [], [], [])
    assert arranged([a, b, c, d], [a, c, d], []) == ([a, d, c], [], [1], [3])
