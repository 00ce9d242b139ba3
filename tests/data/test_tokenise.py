"""The one path from text to ids, with the habits that real tokenizers have."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from encoded import encode_continuation, encode_whole
from tether.data.conversations import is_conversation
from tether.data.tokenise import (
    encode,
    encode_prompt,
    end_with_eos,
    eos_id,
    render,
)
from tether.errors import DataError, ModelError
from tiny import byte_tokenizer

HI = [{"role": "user", "content": "hi"}]
YES = [{"role": "assistant", "content": "yes"}]


def byte_level(*, merges=(), template=None, bos="<s>", eos="</s>") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with merges, that puts around a text what ``template`` says."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = list(dict.fromkeys([bos, eos, "<pad>"]))
    tokens = [*specials, *alphabet, *("".join(merge) for merge in merges)]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    if template:
        ids = [(token, tokens.index(token)) for token in specials]
        core.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token="<pad>")


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Puts a space in front of every text, as Llama's does."""
    letters = ["<s>", "</s>", "<unk>", "▁", "\n", *"abcdefghijklmnopqrstuvwxyz", "▁b", "▁m"]
    core = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(letters)},
            merges=[("▁", "b"), ("▁", "m")],
            unk_token="<unk>",
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def raw(tokenizer, text) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_literals(tokenizer):
    a, b = raw(tokenizer, "ab")
    assert encode(tokenizer, "ab") == [0, a, b]
    assert encode_continuation(tokenizer, "a", "b") == ([0, a], [b, 1])
    assert encode_whole(tokenizer, "ab") == [0, a, b, 1]


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(TEXT, TEXT)
def test_a_prompt_is_the_same_ids_with_and_without_its_completion(prompt, completion):
    tokenizer = byte_level(merges=[("a", "b"), ("Ġ", "t"), ("Ċ", "Ċ")], template="<s> $A </s>")
    prompt_ids, completion_ids = encode_continuation(tokenizer, prompt, completion)
    assert prompt_ids == encode_prompt(tokenizer, prompt)
    assert completion_ids[-1] == 1
    assert tokenizer.decode(prompt_ids + completion_ids, skip_special_tokens=True) == prompt + completion


def test_merge_across_the_boundary():
    tokenizer = byte_level(merges=[("a", "b")], template="<s> $A")
    assert len(encode(tokenizer, "ab")) == 2
    a, b = raw(tokenizer, "a")[0], raw(tokenizer, "b")[0]
    assert encode_continuation(tokenizer, "a", "b") == ([0, a], [b, 1])


@pytest.mark.parametrize(
    ("prompt", "completion"), [("a ti", "me b"), ("q ", "bar"), ("q", " bar"), ("q\n", "bar"), ("q", "\nbar")]
)
def test_the_middle_of_a_text_gets_no_space_in_front(prompt, completion):
    tokenizer = sentencepiece_like()
    assert tokenizer.decode(raw(tokenizer, "a") + raw(tokenizer, "b")) == "a b"  # what must not happen
    prompt_ids, completion_ids = encode_continuation(tokenizer, prompt, completion)
    ids = prompt_ids + completion_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + completion


@pytest.mark.parametrize(("prompt", "completion"), [("Once upon a ti", "me there"), ("A: ", "bar"), ("A:", " bar")])
def test_nor_with_a_real_tokenizer(stories, prompt, completion):
    tokenizer = AutoTokenizer.from_pretrained(stories)
    prompt_ids, completion_ids = encode_continuation(tokenizer, prompt, completion)
    ids = prompt_ids + completion_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + completion
    assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == 1


def test_a_tokenizer_that_adds_eos_itself():
    tokenizer = byte_level(template="<s> $A </s>")
    a, b = raw(tokenizer, "ab")
    assert tokenizer("ab")["input_ids"] == [0, a, b, 1]
    assert encode_prompt(tokenizer, "ab") == [0, a, b]
    assert encode_continuation(tokenizer, "a", "b") == ([0, a], [b, 1])
    assert encode_whole(tokenizer, "ab") == [0, a, b, 1]


def test_a_tokenizer_without_bos():
    tokenizer = byte_level()
    a, b = raw(tokenizer, "ab")
    assert encode_continuation(tokenizer, "a", "b") == ([a], [b, 1])


def test_a_bos_that_is_also_eos():
    tokenizer = byte_level(template="<e> $A", bos="<e>", eos="<e>")
    a, b = raw(tokenizer, "ab")
    assert encode_continuation(tokenizer, "a", "b") == ([0, a], [b, 0])
    assert encode_whole(tokenizer, "ab") == [0, a, b, 0]
    assert encode_prompt(tokenizer, "<e>") == [0]  # nothing but a beginning
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert encode_whole(tokenizer, YES) == [0, *raw(tokenizer, "yes"), 0]


def test_a_bos_spelled_out_is_not_doubled(tokenizer):
    assert encode_prompt(tokenizer, "<s>a") == encode_prompt(tokenizer, "a")
    assert encode_prompt(tokenizer, "<s>") == [0]
    assert encode_prompt(byte_level(), "<s>a") == [0, *raw(byte_level(), "a")]


def test_an_eos_spelled_out_is_not_doubled(tokenizer):
    assert encode_continuation(tokenizer, "a", "b</s>") == encode_continuation(tokenizer, "a", "b")
    assert encode_whole(tokenizer, "ab</s>") == encode_whole(tokenizer, "ab")


def test_end_with_eos(tokenizer):
    a, space, newline = raw(tokenizer, "a \n")
    assert end_with_eos(tokenizer, [a]) == [a, 1]
    assert end_with_eos(tokenizer, [a, 1]) == [a, 1]
    assert end_with_eos(tokenizer, [a, 1, newline, space]) == [a, 1]
    assert end_with_eos(tokenizer, [a, 1, a]) == [a, 1, a, 1]
    assert end_with_eos(tokenizer, []) == [1]


def test_chat_template():
    tokenizer = byte_tokenizer(template=True)
    prompt_ids, completion_ids = encode_continuation(tokenizer, HI, YES)
    assert prompt_ids == [0, *raw(tokenizer, "[user]hi[assistant]")] == encode_prompt(tokenizer, HI)
    assert completion_ids == [*raw(tokenizer, "yes"), 1]  # the template's line break behind EOS is left out
    assert prompt_ids + completion_ids == encode_whole(tokenizer, [*HI, *YES])


def test_a_completion_of_several_turns_is_kept_whole():
    tokenizer = byte_tokenizer(template=True)
    more = [*YES, {"role": "user", "content": "sure?"}, {"role": "assistant", "content": "no"}]
    _, ids = encode_continuation(tokenizer, HI, more)
    assert ids == [*raw(tokenizer, "yes"), 1, *raw(tokenizer, "\n[user]sure?[assistant]no"), 1]


def test_a_template_that_refuses_says_so():
    tokenizer = byte_tokenizer(template=True)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError, match=r"refuses the conversation \(System role not supported\)"):
        render(tokenizer, HI, open_turn=True)


def test_a_template_that_does_not_extend_its_prompt():
    tokenizer = byte_tokenizer(template=True)
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="does not extend a prompt"):
        encode_continuation(tokenizer, HI, YES)


def test_no_template_no_eos_and_mixed_forms(tokenizer):
    with pytest.raises(DataError, match="no chat template; give plain text"):
        encode_prompt(tokenizer, HI)
    with pytest.raises(DataError, match="both be text or both be conversations"):
        encode_continuation(tokenizer, "a", YES)
    without = byte_level()
    without.eos_token = None
    with pytest.raises(ModelError, match="no EOS token"):
        eos_id(without)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (HI, True),
        (tuple(HI), True),
        ([], False),
        ("hi", False),
        (["hi"], False),
        ([{"role": "user"}], False),
        ([{"role": "user", "content": None}], True),  # and then a turn without content
        ([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], True),
        ([{"role": "user", "content": ["hi"]}], True),
        ([{"role": "user", "content": [3]}], False),
        ([{"role": "user", "content": 3}], False),
        ([{"role": "assistant", "tool_calls": [{"name": "f"}]}], True),
        ([{"role": "tool"}], True),
        ([{"from": "human", "value": "hi"}], False),
        (None, False),
    ],
)
def test_what_a_conversation_is(value, expected):
    assert is_conversation(value) is expected
