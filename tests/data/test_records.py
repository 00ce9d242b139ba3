"""Typed records from rows, and every way in which a row can be wrong."""

import json

import pytest
from transformers import AutoTokenizer

from tether.data.records import load_demonstrations, load_pairs, load_prompts
from tether.errors import DataError
from tiny import byte_tokenizer

USER = {"role": "user", "content": "hi"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}
LOADERS = {
    "prompts": lambda *a, **k: load_prompts(*a, max_new_tokens=4, **k),
    "pairs": load_pairs,
    "demonstrations": load_demonstrations,
}


@pytest.fixture
def chat():
    return byte_tokenizer(template=True)


@pytest.fixture
def load(tmp_path, tokenizer):
    """A loader on rows given here; its context is 40 tokens."""

    def run(kind, *rows, tokenizer=tokenizer, context=40, **options):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return LOADERS[kind](str(path), tokenizer, context=context, **options)

    return run


def ids(tokenizer, text) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_prompts(load, tokenizer):
    (prompt,) = load("prompts", {"prompt": "hi", "answer": "4", "n": 1})
    assert prompt.ids == (0, *ids(tokenizer, "hi"))
    assert (prompt.text, prompt.messages, prompt.columns) == ("hi", None, {"answer": "4", "n": 1})


def test_conversational_prompts(load, chat):
    (prompt,) = load("prompts", {"prompt": [USER]}, tokenizer=chat)
    assert prompt.messages == (USER,)
    assert prompt.text == "<s>[user]hi[assistant]"
    assert prompt.ids == (0, *ids(chat, "[user]hi[assistant]"))


def test_pairs_with_their_prompt(load, tokenizer):
    (pair,) = load("pairs", {"prompt": "q:", "chosen": " a", "rejected": " b", "margin": 2})
    assert pair.prompt_ids == (0, *ids(tokenizer, "q:"))
    assert pair.chosen_ids == (*ids(tokenizer, " a"), 1)
    assert pair.rejected_ids == (*ids(tokenizer, " b"), 1)
    assert pair.margin == 2.0


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [("q: a", "q: b", "q: "), ("q", "q: b", "q"), ("q: b", "q", "q"), ("a", "b", ""), ("aa", "aaa", "aa")],
)
def test_implicit_prompt_is_what_both_sides_begin_with(load, tokenizer, chosen, rejected, prompt):
    (pair,) = load("pairs", {"chosen": chosen, "rejected": rejected, "prompt": None})
    assert pair.prompt_ids == (0, *ids(tokenizer, prompt))
    assert pair.prompt_ids + pair.chosen_ids == (0, *ids(tokenizer, chosen), 1)
    assert pair.prompt_ids + pair.rejected_ids == (0, *ids(tokenizer, rejected), 1)
    assert pair.chosen_ids
    assert pair.rejected_ids
    assert pair.margin == 0.0


def test_conversational_pairs_in_all_their_forms_are_one_pair(load, chat):
    (implicit,) = load("pairs", {"chosen": [USER, YES], "rejected": [USER, NO]}, tokenizer=chat)
    (explicit,) = load("pairs", {"prompt": [USER], "chosen": [YES], "rejected": [NO]}, tokenizer=chat)
    (repeated,) = load("pairs", {"prompt": "hi", "chosen": [USER, YES], "rejected": [USER, NO]}, tokenizer=chat)
    assert implicit == explicit == repeated
    assert implicit.prompt_ids == (0, *ids(chat, "[user]hi[assistant]"))
    assert implicit.chosen_ids == (*ids(chat, "yes"), 1)


def test_demonstrations(load, tokenizer, chat):
    (one,) = load("demonstrations", {"prompt": "q:", "completion": " a"})
    assert (one.prompt_ids, one.completion_ids) == ((0, *ids(tokenizer, "q:")), (*ids(tokenizer, " a"), 1))
    (one,) = load("demonstrations", {"text": "abc"})
    assert (one.prompt_ids, one.completion_ids) == ((0,), (*ids(tokenizer, "abc"), 1))
    (one,) = load("demonstrations", {"messages": [USER, YES]}, tokenizer=chat)
    assert one.prompt_ids == (0, *ids(chat, "[user]hi[assistant]"))
    assert one.completion_ids == (*ids(chat, "yes"), 1)
    (same,) = load("demonstrations", {"prompt": [USER], "completion": [YES]}, tokenizer=chat)
    assert same == one


@pytest.mark.parametrize(
    ("kind", "fits", "too_long"),
    [
        ("prompts", {"prompt": "x" * 35}, {"prompt": "x" * 36}),
        ("pairs", {"prompt": "x" * 8, "chosen": "y" * 30, "rejected": "z"}, {"chosen": "y" * 39, "rejected": "z"}),
        ("pairs", {"prompt": "x" * 8, "chosen": "y", "rejected": "z" * 30}, {"chosen": "y", "rejected": "z" * 39}),
        ("demonstrations", {"text": "x" * 38}, {"text": "x" * 39}),
        ("demonstrations", {"prompt": "x", "completion": "y" * 37}, {"prompt": "x", "completion": "y" * 38}),
    ],
)
def test_overlong_rows_to_the_token(load, kind, fits, too_long):
    assert len(load(kind, fits)) == 1
    with pytest.raises(DataError, match=r"data.jsonl:2: .* 41 tokens and the model's context is 40; .*--overlong drop"):
        load(kind, fits, too_long)
    assert load(kind, fits, too_long, overlong="drop") == load(kind, fits)
    with pytest.raises(DataError, match="every row is longer than the model's context of 40 tokens"):
        load(kind, too_long, overlong="drop")


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("prompts", {"question": "q", "answer": "a"}, "column 'prompt' is missing; the row has 'question', 'answer'"),
        ("prompts", {}, "column 'prompt' is missing; the row has no columns"),
        ("prompts", {"prompt": ""}, "prompt is empty"),
        ("prompts", {"prompt": " \n"}, "prompt is empty"),
        ("prompts", {"prompt": None}, "prompt must be text or a list of {role, content}, found NoneType"),
        ("prompts", {"prompt": 3}, "prompt must be text or .*, found int"),
        ("prompts", {"prompt": []}, "prompt must be text or .*, found list"),
        ("prompts", {"prompt": [{"role": "user", "content": " "}]}, "prompt holds a turn without content"),
        ("prompts", {"prompt": [USER]}, "no chat template"),
        ("prompts", {"prompt": "a\ud83d"}, "prompt holds an unpaired surrogate"),
        ("prompts", {"prompt": [{"role": "user", "content": "\udc00"}]}, "prompt holds an unpaired surrogate"),
        ("pairs", {"prompt": "q", "chosen": "a"}, "column 'rejected' is missing; the row has 'prompt', 'chosen'"),
        ("pairs", {**PAIR, "chosen": ""}, "chosen is empty"),
        ("pairs", {**PAIR, "rejected": " "}, "rejected is empty"),
        ("pairs", {**PAIR, "prompt": ""}, "prompt is empty"),
        ("pairs", {**PAIR, "rejected": "a"}, "chosen and rejected are equal"),
        ("pairs", {"chosen": "same", "rejected": "same"}, "chosen and rejected are equal"),
        ("pairs", {**PAIR, "chosen": "b</s>"}, "same token ids"),
        ("pairs", {**PAIR, "margin": "0.5"}, "margin must be a finite number, found '0.5'"),
        ("pairs", {**PAIR, "margin": True}, "margin must be a finite number, found True"),
        ("pairs", {**PAIR, "margin": float("nan")}, "margin must be a finite number, found nan"),
        ("pairs", {**PAIR, "chosen": [YES], "rejected": [NO]}, "must both be text or both be conversations"),
        ("demonstrations", {"content": "a"}, "column 'text', or 'prompt' and 'completion' is missing; .* 'content'"),
        ("demonstrations", {"prompt": "q"}, "column 'completion' is missing"),
        ("demonstrations", {"completion": "q"}, "column 'prompt' is missing"),
        ("demonstrations", {"prompt": "q", "completion": ""}, "completion is empty"),
        ("demonstrations", {"text": ""}, "text is empty"),
        ("demonstrations", {"messages": [USER]}, "messages must hold at least two turns"),
        ("demonstrations", {"messages": "hello there"}, "messages must hold at least two turns"),
    ],
)
def test_wrong_rows_are_named_with_what_is_wrong(load, kind, row, message):
    good = {"prompts": {"prompt": "q"}, "pairs": PAIR, "demonstrations": {"text": "abc"}}[kind]
    with pytest.raises(DataError, match=f"data.jsonl:2: .*{message}") as caught:
        load(kind, good, row)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("data.jsonl") == 1


def test_helpfulness_pairs(stories, shared_data):
    """Real pairs with an implicit prompt: the split falls where the two dialogues part, and nothing is lost."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    pairs = load_pairs(
        str(shared_data / "hh_rlhf" / "harmless-base.test.jsonl.gz"), tokenizer, context=512, overlong="drop"
    )
    assert len(pairs) > 1000
    for pair in pairs[::50]:
        assert pair.chosen_ids[0] != pair.rejected_ids[0]
        assert "Assistant:" in tokenizer.decode(pair.prompt_ids)
        for side in (pair.chosen_ids, pair.rejected_ids):
            assert side[-1] == tokenizer.eos_token_id
            assert len(pair.prompt_ids) + len(side) <= 512


def test_real_pairs_whose_sides_are_equal_are_found(stories, shared_data):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    with pytest.raises(DataError, match=r"helpful-base.test.jsonl.gz:722: chosen and rejected are equal"):
        load_pairs(str(shared_data / "hh_rlhf" / "helpful-base.test.jsonl.gz"), tokenizer, context=10**6)


def test_school_problems_need_their_column_named_prompt(tmp_path, stories, shared_data):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    source = shared_data / "gsm8k" / "test.jsonl"
    with pytest.raises(DataError, match=r"test.jsonl:1: column 'prompt' is missing; the row has 'question', 'answer'"):
        load_prompts(str(source), tokenizer, context=512, max_new_tokens=8)
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    renamed = tmp_path / "gsm8k.jsonl"
    renamed.write_text("".join(json.dumps({"prompt": r["question"], "answer": r["answer"]}) + "\n" for r in rows))
    prompts = load_prompts(str(renamed), tokenizer, context=512, max_new_tokens=8, overlong="drop")
    assert len(prompts) > 1000
    assert all("####" in prompt.columns["answer"] for prompt in prompts)
