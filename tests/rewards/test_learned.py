"""A reward model as a reward: what it reads, and where."""

import json
import math
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from encoded import encode_continuation
from helpers import completion, rows_of
from tether.data.records import load_pairs
from tether.errors import DataError, MemoryShortError, ModelError, RewardError
from tether.generation.engine import Engine
from tether.models.loading import embedding_rows, load_policy
from tether.models.reward import head_of, new_reward_model, save_reward_model, score_sequences
from tether.rewards.learned import LearnedReward
from tether.rewards.resolve import resolve_reward
from tether.types import FinishReason, Prompt, RolloutGroup, Sampling, make_requests
from tiny import byte_tokenizer, make_model

EOS = 1
HI = ({"role": "user", "content": "hi"},)


def rollouts(prompt, *completions) -> list[RolloutGroup]:
    return [RolloutGroup(prompt=prompt, completions=completions)]


def read(monkeypatch, reward, groups) -> list[list[int]]:
    """The sequences that the reward model is given."""
    seen: list[list[int]] = []

    def spy(model, rows, **kwargs):
        seen.extend([*before, *after] for before, after in rows)
        return score_sequences(model, rows, **kwargs)

    monkeypatch.setattr("tether.rewards.learned.score_sequences", spy)
    reward.judge(groups)
    return seen


def scores(reward, groups) -> list[float]:
    """What the reward says of the completions of the only group."""
    (judged,) = reward.judge(groups)
    return [judgement.value for judgement in judged]


@pytest.fixture
def same(tiny):
    """A reward model of the policy's own vocabulary, with a context of 128."""
    model, tokenizer = new_reward_model(tiny, seed=0)
    return LearnedReward("judge", model, tokenizer, same_vocabulary=True)


def reversed_bytes() -> PreTrainedTokenizerFast:
    """The byte tokenizer with its ids in another order: ``</e>`` 0, ``<b>`` 1."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(["</e>", "<b>", "<p>", *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<b> $A", special_tokens=[("<b>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<b>", eos_token="</e>", pad_token="<p>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


@pytest.fixture
def other(tiny):
    """A reward model of another vocabulary, with a chat template of its own."""
    model, _ = new_reward_model(tiny, seed=0)
    model.config.eos_token_id = 0
    return LearnedReward("judge", model, reversed_bytes(), same_vocabulary=False)


def test_a_finished_completion_is_read_as_it_is(same, monkeypatch):
    groups = rollouts(Prompt(ids=(0, 5), text="p"), completion([6, 7, EOS]), completion([EOS]))
    assert read(monkeypatch, same, groups) == [[0, 5, 6, 7, EOS], [0, 5, EOS]]


@pytest.mark.parametrize("finish", [FinishReason.LENGTH, FinishReason.STOP])
def test_a_completion_without_eos_is_closed(same, monkeypatch, finish):
    groups = rollouts(Prompt(ids=(0, 5), text="p"), completion([6, 7], finish=finish))
    assert read(monkeypatch, same, groups) == [[0, 5, 6, 7, EOS]]


def test_so_cut_and_finished_completions_score_alike(same):
    groups = rollouts(
        Prompt(ids=(0, 5), text="p"), completion([6, 7], finish=FinishReason.LENGTH), completion([6, 7, EOS])
    )
    cut, finished = scores(same, groups)
    assert cut == pytest.approx(finished, abs=1e-5)
    unclosed = score_sequences(same.model, [((0, 5), (6, 7))]).item()
    assert abs(unclosed - finished) > 1e-2  # closing it is what makes them so


def test_every_end_of_the_reward_model_is_one(same, monkeypatch):
    same.model.config.eos_token_id = [EOS, 9]
    groups = rollouts(Prompt(ids=(0, 5), text="p"), completion([6, 9], finish=FinishReason.EOS), completion([6, 8]))
    assert read(monkeypatch, same, groups) == [[0, 5, 6, 9], [0, 5, 6, 8, EOS]]


def test_scores_are_normalised(same):
    groups = rollouts(Prompt(ids=(0, 5), text="p"), completion([6, EOS]), completion([7, 8]))
    a, b = scores(same, groups)
    same.model.config.score_mean, same.model.config.score_std = 2.0, 4.0
    assert scores(same, groups) == pytest.approx([(a - 2) / 4, (b - 2) / 4], abs=1e-6)


def test_a_cut_completion_that_fills_the_context_makes_room_for_eos(same, monkeypatch):
    prompt = Prompt(ids=(0, 5), text="p")
    cut = completion([*range(10, 136)], finish=FinishReason.LENGTH)
    assert read(monkeypatch, same, rollouts(prompt, cut)) == [[0, 5, *range(10, 135), EOS]]
    ends = completion([*range(10, 135), EOS])
    assert read(monkeypatch, same, rollouts(prompt, ends)) == [[0, 5, *range(10, 135), EOS]]


@pytest.mark.parametrize("last", [137, EOS])
def test_what_is_longer_than_the_context_is_refused(same, last):
    groups = rollouts(Prompt(ids=(0, 5), text="p"), completion([*range(10, 136), last]))
    with pytest.raises(
        RewardError, match=r"'judge': prompt and completion take 1.. tokens, and the reward model reads 128"
    ):
        same.judge(groups)


def test_weights_that_are_not_usable(same):
    with torch.no_grad():
        head_of(same.model).weight.fill_(math.nan)
    with pytest.raises(RewardError, match="'judge': the reward model gave nan; its weights are not usable"):
        same.judge(rollouts(Prompt(ids=(0, 5), text="p"), completion([6, EOS])))


# -- memory that runs out -------------------------------------------------------------------------------------------


def scorer_of(budget, tried):
    """``score_sequences`` on a machine that holds ``budget`` tokens at a time."""

    def score(model, rows, *, token_budget):
        tried.append(token_budget)
        if token_budget > budget:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore of it")
        return score_sequences(model, rows, token_budget=token_budget)

    return score


def test_memory_that_runs_out_halves_the_budget_and_changes_no_score(same, monkeypatch):
    groups = rollouts(Prompt(ids=(0, 5), text="p"), *(completion([6 + i] * (3 + i) + [EOS]) for i in range(6)))
    expected = scores(same, groups)
    tried: list[int] = []
    monkeypatch.setattr("tether.rewards.learned.score_sequences", scorer_of(20, tried))
    assert scores(same, groups) == pytest.approx(expected, abs=1e-5)
    assert tried == [16384 >> i for i in range(11)]
    tried.clear()
    same.judge(groups)
    assert tried == [16]  # what fitted is kept


def test_a_row_that_does_not_fit_is_an_error(same, monkeypatch):
    tried: list[int] = []
    monkeypatch.setattr("tether.rewards.learned.score_sequences", scorer_of(0, tried))
    with pytest.raises(MemoryShortError, match=r"^reward 'judge': out of memory, .*2 GiB\); lower max_new_tokens, or "):
        same.judge(rollouts(Prompt(ids=(0, 5), text="p"), completion([6, EOS])))
    assert tried[-1] == 1


# -- another vocabulary ---------------------------------------------------------------------------------------------


def test_text_is_tokenised_again_and_always_closed(other, monkeypatch):
    groups = rollouts(
        Prompt(ids=(0, 5), text="hi "),
        completion([6, EOS], text="you"),
        completion([6], finish=FinishReason.LENGTH, text="you"),
        completion([EOS], text=""),
    )
    you = other.tokenizer("hi you")["input_ids"]
    assert you[0] == 1
    nothing = other.tokenizer("hi ")["input_ids"]
    assert read(monkeypatch, other, groups) == [[*you, 0], [*you, 0], [*nothing, 0]]


def test_a_conversation_goes_through_the_reward_models_own_template(other, monkeypatch):
    prompt = Prompt(ids=(0, 5), text="<s>[user]hi[assistant]", messages=HI)
    expected = other.tokenizer("<b><user>hi<assistant>yes</e>", add_special_tokens=False)["input_ids"]
    groups = rollouts(prompt, completion([6, EOS], text="yes"), completion([6], finish=FinishReason.STOP, text="yes"))
    assert read(monkeypatch, other, groups) == [expected, expected]


def test_which_is_what_it_was_trained_on(other, monkeypatch, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(
        '{"chosen": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}],'
        ' "rejected": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}]}\n'
        '{"prompt": "hi ", "chosen": "you", "rejected": "me"}\n'
    )
    trained = [
        [*pair.prompt_ids, *pair.chosen_ids]
        for pair in load_pairs(str(tmp_path / "pairs.jsonl"), other.tokenizer, context=128)
    ]
    groups = [
        *rollouts(Prompt(ids=(0,), text="-", messages=HI), completion([6], text="yes")),
        *rollouts(Prompt(ids=(0,), text="hi "), completion([6], text="you")),
    ]
    assert read(monkeypatch, other, groups) == trained


def test_a_conversation_without_a_template(other):
    other.tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        other.judge(rollouts(Prompt(ids=(0,), text="-", messages=HI), completion([6], text="yes")))


# -- one vocabulary, other habits -----------------------------------------------------------------------------------


def agreement(tiny, change, prompt):
    """A reward model whose tokenizer is the policy's but for ``change``, and whether it reads the policy's ids."""
    model, _ = new_reward_model(tiny, seed=0)
    own = byte_tokenizer(template=True)
    change(own)
    reward = LearnedReward.of("judge", model, own, byte_tokenizer(template=True))
    assert reward.same_vocabulary
    return reward, reward.reads_ids(prompt)


def other_template(own):
    own.chat_template = "{% for m in messages %}{{ m.content }}|{% endfor %}"


def no_bos(own):
    core = json.loads(own.backend_tokenizer.to_str())
    core["post_processor"] = None
    own._tokenizer = Tokenizer.from_str(json.dumps(core))


def other_eos(own):
    own.eos_token = own.convert_ids_to_tokens(2)


def nothing(own):
    pass


TEXT, CHAT = Prompt(ids=(0, 75), text="H"), Prompt(ids=(0, 9), text="-", messages=HI)


@pytest.mark.parametrize(
    ("change", "of_text", "of_chat"),
    [(nothing, True, True), (other_template, True, False), (no_bos, False, True), (other_eos, False, False)],
)
def test_ids_are_read_only_where_its_own_rendering_gives_them(tiny, monkeypatch, change, of_text, of_chat):
    reward, reads = agreement(tiny, change, TEXT)
    assert (reads, reward.reads_ids(CHAT)) == (of_text, of_chat)
    for prompt, ids in ((TEXT, of_text), (CHAT, of_chat)):
        with monkeypatch.context() as patch:
            (found,) = read(patch, reward, rollouts(prompt, completion([6, EOS], text="yes")))
        turn = [{"role": "assistant", "content": "yes"}] if prompt.messages else "yes"
        own = encode_continuation(reward.tokenizer, prompt.messages or prompt.text, turn)
        assert found == ([*prompt.ids, 6, EOS] if ids else [*own[0], *own[1]])


def test_a_row_gives_the_template_what_it_gave_the_policys(tiny, monkeypatch):
    def with_options(own):
        own.chat_template = "{% if short %}S{% endif %}" + own.chat_template

    reward, _ = agreement(tiny, with_options, CHAT)
    short = replace(CHAT, columns={"chat_template_kwargs": {"short": True}})
    given, plain = (
        read(monkeypatch, reward, rollouts(prompt, completion([6, EOS], text="yes")))[0] for prompt in (short, CHAT)
    )
    assert len(given) == len(plain) + 1
    assert reward.rendered(short) == "S" + reward.rendered(CHAT)


def test_the_score_is_that_of_its_own_rendering(tiny):
    reward, _ = agreement(tiny, other_template, CHAT)
    own = encode_continuation(reward.tokenizer, CHAT.messages, [{"role": "assistant", "content": "yes"}])
    expected = score_sequences(reward.model, [own]).tolist()
    assert scores(reward, rollouts(CHAT, completion([6, EOS], text="yes"))) == pytest.approx(expected, abs=1e-5)


def test_an_id_beyond_the_embedding_is_read_as_text(same, monkeypatch):
    """A policy may have more rows than its vocabulary, and emit an id that no text has."""
    rows = embedding_rows(same.model)
    groups = rollouts(TEXT, completion([6, rows, EOS], text="a"), completion([6, rows - 1, EOS], text="a"))
    beyond, within = read(monkeypatch, same, groups)
    assert beyond == [*same.tokenizer("Ha")["input_ids"], EOS]
    assert within == [*TEXT.ids, 6, rows - 1, EOS]


# -- from a directory -----------------------------------------------------------------------------------------------


def test_a_directory_as_a_reward(tiny, tmp_path, tokenizer):
    model, own = new_reward_model(tiny, seed=3)
    save_reward_model(model, own, tmp_path / "judge" / "model", [((0, 5), (EOS,)), ((0, 6), (EOS,))])
    reward = resolve_reward(str(tmp_path / "judge" / "model"), tokenizer, dtype=torch.float32, device="cpu")
    assert isinstance(reward, LearnedReward)
    assert reward.name == "judge"
    assert reward.same_vocabulary
    assert reward.reads_ids(Prompt(ids=(0,), text="p"))
    assert reward.reads_ids(Prompt(ids=(0,), text="p", messages=HI))
    assert not any(p.requires_grad for p in reward.model.parameters())
    groups = rollouts(Prompt(ids=(0, 5), text="p"), completion([6, EOS]), completion([7]))
    expected = score_sequences(model, [((0, 5), (6, EOS)), ((0, 5), (7, EOS))]).tolist()
    assert scores(reward, groups) == pytest.approx(expected, abs=1e-5)
    assert not resolve_reward(
        str(tmp_path / "judge" / "model"), reversed_bytes(), dtype=torch.float32, device="cpu"
    ).same_vocabulary


@pytest.fixture
def foreign(tiny, tmp_path):
    """A function that writes a reward model as OpenRLHF does, with ``options`` in its configuration."""

    def write(**options):
        model, own = new_reward_model(tiny, seed=3)
        save_reward_model(model, own, tmp_path / "rm", [((0, 5), (EOS,)), ((0, 6), (EOS,))], overwrite=True)
        file = tmp_path / "rm" / "config.json"
        config = json.loads(file.read_text())
        for name in ("num_labels", "id2label", "label2id", "score_mean", "score_std"):
            config.pop(name, None)
        file.write_text(json.dumps(config | {"architectures": ["RewardModel"]} | options))
        return str(tmp_path / "rm"), model

    return write


def test_a_reward_model_of_openrlhf(foreign, tokenizer):
    """Its configuration states no labels, and the statistics of its scores as ``mean`` and ``std``."""
    groups = rollouts(Prompt(ids=(0, 5), text="p"), completion([6, EOS]), completion([7, EOS]))
    for options, mean, std in (({}, 0.0, 1.0), ({"mean": 2.0, "std": 4.0}, 2.0, 4.0)):
        path, model = foreign(**options)
        raw = score_sequences(model, [((0, 5), (6, EOS)), ((0, 5), (7, EOS))])
        reward = resolve_reward(path, tokenizer, dtype=torch.float32, device="cpu")
        assert scores(reward, groups) == pytest.approx(((raw - mean) / std).tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"std": 0.0}, r"rm: scores cannot be normalised by the mean 0.0 and std 0.0 of its configuration"),
        ({"mean": math.inf}, r"cannot be normalised by the mean inf"),
        ({"id2label": {"0": "a", "1": "b"}}, r"rm: a reward model has one label and this classifier has 2"),
    ],
)
def test_foreign_configurations_that_are_refused(foreign, tokenizer, options, message):
    path, _ = foreign(**options)
    with pytest.raises(ModelError, match=message):
        resolve_reward(path, tokenizer, dtype=torch.float32, device="cpu")


def test_the_padding_token_that_training_added_changes_no_vocabulary(tmp_path):
    """Base and policy pad with EOS; the reward model of the same base has one token more."""
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    config = GPT2Config(vocab_size=264, n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model, own = new_reward_model(str(tmp_path / "base"), seed=0)
    save_reward_model(model, own, tmp_path / "rm", [((0, 5), (EOS,)), ((0, 6), (EOS,))])
    reward = resolve_reward(str(tmp_path / "rm"), tokenizer, dtype=torch.float32, device="cpu")
    assert len(own) == len(tokenizer) + 1
    assert reward.same_vocabulary


def test_a_policy_and_a_judge_of_different_vocabularies(stories, tmp_path):
    """The real model writes, a byte-level model judges."""
    policy, tokenizer = load_policy(stories)
    make_model(tmp_path / "base", "qwen2")
    model, own = new_reward_model(str(tmp_path / "base"), seed=0)
    save_reward_model(model, own, tmp_path / "rm", [((0, 5), (EOS,)), ((0, 6), (EOS,))])
    reward = resolve_reward(str(tmp_path / "rm"), tokenizer, dtype=torch.float32, device="cpu")
    assert not reward.same_vocabulary
    prompt = Prompt(ids=tuple(tokenizer("One day")["input_ids"]), text="One day")
    asked = make_requests([prompt], group_size=3, seed=0)
    groups = Engine(policy, tokenizer).generate(asked, sampling=Sampling(max_new_tokens=12))
    texts = ["One day" + c.text for c in groups[0].completions]
    expected = score_sequences(model, rows_of([[*own(text)["input_ids"], EOS] for text in texts]))
    assert scores(reward, groups) == pytest.approx(expected.tolist(), abs=1e-4)
