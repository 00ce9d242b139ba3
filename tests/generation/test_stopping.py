"""Where completions end: stop strings in all places and kinds of tokens, and the text that is left."""

from __future__ import annotations

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from tether.generation.engine import Engine
from tether.generation.naive import NaiveGenerator
from tether.generation.stopping import Ending, text_of
from tether.models.loading import load_policy
from tether.types import FinishReason, Prompt, Sampling, make_requests
from tiny import byte_tokenizer


def pieces_tokenizer() -> PreTrainedTokenizerFast:
    """Pieces with a mark for the space before them, as SentencePiece has them: the first one of a text loses it."""
    pieces = ["▁The", "▁User", "User", ":", "▁end", "▁", "a", "b", "▁a", ",", "▁,", "<0xE2>", "<0x82>", "<0xAC>"]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *pieces])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=True
    )
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True), AddedToken("<tool>", special=False)])
    return tokenizer


PIECES = pieces_tokenizer()
BOS, PROMPT = (1,), "<s> ▁The ▁end :"


def ids_of(tokens: str) -> list[int]:
    """The ids of tokens that are written with spaces between them."""
    return [PIECES.convert_tokens_to_ids(token) for token in tokens.split()]


def reason(tokens: str, *stop: str, after: str = PROMPT, least: int = 0) -> FinishReason | None:
    ending = Ending(Sampling(max_new_tokens=500, min_new_tokens=least, stop=stop), (2,), PIECES)
    return ending.reason(ids_of(tokens), after=ids_of(after))


STOP = FinishReason.STOP


@pytest.mark.parametrize("after", [PROMPT, "<s>", "<s> <|im_end|>", ""])
@pytest.mark.parametrize(
    ("tokens", "stop"),
    [
        ("▁The", "The"),  # the first token, without and with the space that it stands for
        ("▁The", " The"),
        ("▁User :", " User:"),
        ("User :", "User:"),
        ("a ▁The", "a The"),
        ("a ▁User :", " User:"),
        ("<|im_end|>", "<|im_end|>"),  # special tokens: alone, within text, two of them
        ("a <|im_end|>", "<|im_end|>"),
        ("▁The ▁end <|im_end|>", "end<|im_end|>"),
        ("<|im_end|> ▁end", "<|im_end|> end"),
        ("<|im_end|> <|im_end|>", "<|im_end|><|im_end|>"),
        ("<s> a", "<s>a"),
        ("<tool>", "<tool>"),  # added, and not special
        ("a <|im_end|> b", "ab"),  # across a special token, which the text does not show
        ("a " + "<|im_end|> " * 30 + "b", "ab"),
        ("<0xE2> <0x82> <0xAC>", "€"),  # a character of several tokens
        ("a <0xE2> <0x82> <0xAC> b", "€b"),
        ("▁The ▁,", "The ,"),  # spaces before punctuation are as the policy emitted them
    ],
)
def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(tokens, stop, after):
    assert reason(tokens, stop, after=after) is STOP
    assert reason("a a b " * 30 + tokens, stop, after=after) is STOP
    assert reason(tokens, "nowhere", stop, after=after) is STOP
    for count in range(1, len(tokens.split())):
        assert reason(" ".join(tokens.split()[:count]), stop, after=after) is None


@pytest.mark.parametrize(
    ("tokens", "stop"),
    [
        ("User :", " User:"),  # without its space
        ("▁User", "User:"),
        ("▁The", "<|im_end|>"),
        ("<|im_end|>", "<|im_start|>"),
        (",", ":,x"),
        ("<|im_end|>", "end"),  # part of a special token, which the text does not show
        ("a <|im_end|>", "d|>"),
        ("a <s>", "s"),
    ],
)
def test_what_is_not_the_stop_string_does_not_end_it(tokens, stop):
    assert reason(tokens, stop) is None


def test_a_stop_string_does_not_begin_in_the_prompt():
    assert reason("a", ":a") is None
    assert reason("<|im_end|>", ":<|im_end|>") is None


def test_it_counts_from_the_minimum_length_on():
    assert reason("<|im_end|>", "<|im_end|>", least=2) is None
    assert reason("<|im_end|> a", "<|im_end|>", least=2) is STOP


def test_the_end_of_the_sequence_comes_first():
    assert reason("</s>", "</s>") is FinishReason.EOS


def test_the_text_has_no_special_tokens_and_all_spaces():
    after = ids_of(PROMPT)
    assert text_of(PIECES, ids_of("▁The ▁, <|im_end|>"), after=after) == " The ,"
    assert text_of(PIECES, ids_of("▁The"), after=ids_of(PROMPT + " <|im_end|>" * 20)) == " The"
    assert text_of(PIECES, ids_of("▁The"), after=BOS) == "The"
    assert text_of(PIECES, ids_of("▁The <|im_end|>"), after=after, special=True) == " The<|im_end|>"


@pytest.mark.parametrize("generator", [Engine, NaiveGenerator])
def test_generators_stop_at_a_special_token(tiny, generator):
    model, _ = load_policy(tiny)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=True)])
    special = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert special < 264
    with torch.no_grad():  # tied to the embedding: the special token is likely everywhere
        model.model.embed_tokens.weight[special] = model.model.embed_tokens.weight[special] * 3
    asked = make_requests([Prompt(ids=(0, 70, 71), text="ab")], group_size=24, seed=3)
    sampling = Sampling(max_new_tokens=40, temperature=2.0, stop=("<|im_end|>",))
    (group,) = generator(model, tokenizer).generate(asked, sampling=sampling)
    stopped = [c for c in group.completions if c.finish_reason is STOP]
    assert stopped
    for completion in stopped:
        assert completion.ids[-1] == special
        assert special not in completion.ids[:-1]
        assert "im_end" not in completion.text
    assert all(special not in c.ids for c in group.completions if c.finish_reason is not STOP)
