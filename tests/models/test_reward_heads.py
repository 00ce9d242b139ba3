"""Reward models: made, saved, read by transformers alone, and refused when that would give other scores."""

import contextlib
import json
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GraniteConfig,
    WhisperConfig,
)

from commandline import tether, workspace
from helpers import rows_of
from runs import LINES
from tether.errors import ConfigError, ModelError
from tether.models.classifiers import in_the_library
from tether.models.loading import load_policy
from tether.models.packing import pack
from tether.models.reward import (
    head_of,
    load_reward_model,
    new_reward_model,
    normalised_scores,
    save_reward_model,
    score_sequences,
)
from tether.types import Batch
from tiny import ARCHITECTURES, byte_tokenizer, make_model

EOS = 1
GRANITE = GraniteConfig(
    vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
    pad_token_id=2, logits_scaling=3.0,
)  # fmt: skip
"""An architecture without a classifier in the library."""


def sequences(count=9, *, longest=40, seed=0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[0, *(draw.randrange(3, 260) for _ in range(draw.randrange(1, longest))), EOS] for _ in range(count)]


def transformers_scores(directory, tokens) -> torch.Tensor:
    """As somebody else would score: their classes, a padded batch, an attention mask."""
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    batch = tokenizer.pad({"input_ids": tokens}, return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        return model(**batch).logits.squeeze(-1)


@pytest.fixture(params=ARCHITECTURES)
def reward_model(request, tiny_models):
    return new_reward_model(tiny_models[request.param], seed=0)


def test_saved_scores_are_transformers_scores(reward_model, tmp_path):
    model, tokenizer = reward_model
    tokens = sequences()
    expected = score_sequences(model, rows_of(tokens))
    assert expected.std() > 0.05  # or this test would hold for anything
    save_reward_model(model, tokenizer, tmp_path / "rm", rows_of(tokens[:3]))
    torch.testing.assert_close(transformers_scores(tmp_path / "rm", tokens), expected, rtol=1e-4, atol=1e-5)
    assert load_file(tmp_path / "rm" / "model.safetensors")["score.weight"].shape == (1, 32)
    config = AutoConfig.from_pretrained(tmp_path / "rm")
    assert config.num_labels == 1
    assert config.architectures == [type(model).__name__]
    assert "SequenceClassification" in config.architectures[0]
    again, _ = load_reward_model(str(tmp_path / "rm"))
    torch.testing.assert_close(score_sequences(again, rows_of(tokens)), expected, rtol=1e-5, atol=1e-6)


def test_scores_do_not_depend_on_the_batch(reward_model):
    model, _ = reward_model
    tokens = sequences()
    together = score_sequences(model, rows_of(tokens))
    for budget in (1, 60, 10**6):
        apart = score_sequences(model, rows_of(tokens), token_budget=budget)
        torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for row, score in zip(tokens, together, strict=True):
            hidden = model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0, -1]
            torch.testing.assert_close((head_of(model).weight @ hidden)[0], score, rtol=1e-4, atol=1e-5)


def test_two_sides_share_their_prompt_and_score_as_if_they_did_not(reward_model):
    model, _ = reward_model
    tokens = [[0, 9, 8, 7, 6, 5, *row[1:]] for row in sequences()]
    shared, apart = (score_sequences(model, rows_of(tokens, prompt=n)) for n in (6, 1))
    torch.testing.assert_close(shared, apart, rtol=1e-4, atol=1e-5)
    batch = Batch.collate(rows_of(tokens, prompt=6))
    distinct = 6 + sum(len(row) - 6 for row in tokens)
    assert pack(batch, ends=True).ids.shape == (1, distinct)


def test_the_head_is_drawn_from_its_seed(tiny):
    heads = [head_of(new_reward_model(tiny, seed=seed)[0]).weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    many = torch.cat([head_of(new_reward_model(tiny, seed=seed)[0]).weight.flatten() for seed in range(20)])
    assert many.std().item() == pytest.approx(1 / math.sqrt(33), rel=0.1)


def test_normalisation_is_stored_with_the_model(tiny, tmp_path):
    model, tokenizer = new_reward_model(tiny, seed=0)
    assert normalised_scores(model, torch.tensor([3.0])).tolist() == [3.0]
    model.config.score_mean, model.config.score_std = 1.0, 4.0
    save_reward_model(model, tokenizer, tmp_path / "rm", rows_of(sequences(2)))
    again, _ = load_reward_model(str(tmp_path / "rm"))
    assert (again.config.score_mean, again.config.score_std) == (1.0, 4.0)
    assert normalised_scores(again, torch.tensor([3.0, 1.0])).tolist() == [0.5, 0.0]


def test_a_model_of_others_without_stored_normalisation(tiny, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    model.save_pretrained(tmp_path / "theirs")
    byte_tokenizer().save_pretrained(tmp_path / "theirs")
    again, _ = load_reward_model(str(tmp_path / "theirs"))
    assert normalised_scores(again, torch.tensor([3.0])).tolist() == [3.0]


@pytest.mark.parametrize("pad_token", [None, "</s>"])
def test_padding_with_eos_or_not_at_all_is_corrected(tmp_path, pad_token):
    """transformers reads the right-most token that is not padding: with EOS for padding, the one before EOS."""
    make_model(tmp_path / "base", "gpt2")
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = pad_token
    tokenizer.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"pad_token_id": pad_token and EOS}))
    model, tokenizer = new_reward_model(str(tmp_path / "base"), seed=0)
    assert tokenizer.pad_token_id not in (None, EOS)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    save_reward_model(model, tokenizer, tmp_path / "rm", rows_of(sequences(3)))
    tokens = sequences()
    torch.testing.assert_close(
        transformers_scores(tmp_path / "rm", tokens), score_sequences(model, rows_of(tokens)), rtol=1e-4, atol=1e-5
    )


def gpt2_like(directory: Path) -> str:
    """One special token for BOS, EOS and padding, none put in front, and an embedding without a row to spare."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    tokenizer.bos_token = tokenizer.pad_token = "</s>"
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3,
        bos_token_id=EOS, eos_token_id=EOS,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def test_an_embedding_that_is_full_grows_by_the_padding_token(tmp_path):
    base = gpt2_like(tmp_path / "base")
    model, tokenizer = new_reward_model(base, seed=0)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == 260
    tokens = [row[1:] for row in sequences()]
    save_reward_model(model, tokenizer, tmp_path / "rm", rows_of(tokens))
    torch.testing.assert_close(
        transformers_scores(tmp_path / "rm", tokens), score_sequences(model, rows_of(tokens)), rtol=1e-4, atol=1e-5
    )
    assert load_reward_model(str(tmp_path / "rm"))[0].config.vocab_size == 260


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_of_the_save(tiny, tmp_path, dtype):
    model, tokenizer = new_reward_model(tiny, seed=0, dtype=dtype)
    save_reward_model(model, tokenizer, tmp_path / "rm", rows_of(sequences()))
    assert load_file(tmp_path / "rm" / "model.safetensors")["score.weight"].dtype == dtype


def test_on_the_real_model(stories, tmp_path):
    model, tokenizer = new_reward_model(stories, seed=0)
    texts = ["Once upon a time, there was a dog.", "The end.", "She was happy because"]
    tokens = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    save_reward_model(model, tokenizer, tmp_path / "rm", rows_of(tokens))
    torch.testing.assert_close(
        transformers_scores(tmp_path / "rm", tokens), score_sequences(model, rows_of(tokens)), rtol=1e-4, atol=1e-5
    )


# -- refused --------------------------------------------------------------------------------------------------------


def test_a_save_that_would_change_the_scores_is_refused_and_leaves_nothing(tiny, tmp_path):
    model, tokenizer = new_reward_model(tiny, seed=0)
    model.config.pad_token_id = EOS
    with pytest.raises(
        ModelError, match=r"rm: not saved: after a reload the scores differ by up to .*LlamaForSequence"
    ):
        save_reward_model(model, tokenizer, tmp_path / "out" / "rm", rows_of(sequences(3)))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_refused_save_keeps_what_was_there(tiny, tmp_path):
    model, tokenizer = new_reward_model(tiny, seed=0)
    save_reward_model(model, tokenizer, tmp_path / "rm", rows_of(sequences(3)))
    before = (tmp_path / "rm" / "model.safetensors").read_bytes()
    with torch.no_grad():
        head_of(model).weight.fill_(math.nan)
    with pytest.raises(ModelError, match="not saved: the model's scores are not finite"):
        save_reward_model(model, tokenizer, tmp_path / "rm", rows_of(sequences(3)), overwrite=True)
    assert (tmp_path / "rm" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["rm"]


def test_a_save_replaces_what_was_there_only_if_it_is_asked_to(tiny, tmp_path):
    first, tokenizer = new_reward_model(tiny, seed=0)
    save_reward_model(first, tokenizer, tmp_path / "rm", rows_of(sequences(3)))
    model, _ = new_reward_model(tiny, seed=1)
    for overwrite, kept in ((False, first), (True, model)):
        with contextlib.nullcontext() if overwrite else pytest.raises(ConfigError, match="rm: holds a model already"):
            save_reward_model(model, tokenizer, tmp_path / "rm", rows_of(sequences(3)), overwrite=overwrite)
        saved = load_file(tmp_path / "rm" / "model.safetensors")["score.weight"]
        assert torch.equal(saved, head_of(kept).weight)


def test_a_language_model_is_no_reward_model(tiny):
    with pytest.raises(
        ModelError, match=r"not a reward model: its architecture is LlamaForCausalLM; .*'tether reward'"
    ):
        load_reward_model(tiny)


def test_a_reward_model_is_no_language_model(tiny, tmp_path):
    """Its embeddings being tied, it would load as one."""
    model, tokenizer = new_reward_model(tiny, seed=0)
    save_reward_model(model, tokenizer, tmp_path / "rm", rows_of(sequences(3)))
    with pytest.raises(ModelError, match="rm: a reward model where a language model is needed"):
        load_policy(str(tmp_path / "rm"))


def test_a_classifier_of_several_labels_is_no_reward_model(tiny, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=3).save_pretrained(tmp_path / "three")
    byte_tokenizer().save_pretrained(tmp_path / "three")
    with pytest.raises(ModelError, match="a reward model has one label and this classifier has 3"):
        load_reward_model(str(tmp_path / "three"))


def test_a_head_that_was_lost_is_not_made_up(tiny, tmp_path):
    """The directory says SequenceClassification, the weights are a language model's."""
    make_model(tmp_path / "lost", "qwen2")
    path = tmp_path / "lost" / "config.json"
    config = json.loads(path.read_text())
    config |= {"architectures": ["Qwen2ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"do not fit the configuration \(1 tensors, first score.weight\)"):
        load_reward_model(str(tmp_path / "lost"))


def test_a_head_with_a_bias_is_refused(tiny):
    model, _ = new_reward_model(tiny, seed=0)
    model.score = torch.nn.Linear(32, 1)
    with pytest.raises(ModelError, match="no bias-free linear head named 'score'"):
        head_of(model)


def test_a_reward_model_is_trained_on_with_its_head(tiny, tmp_path):
    model, tokenizer = new_reward_model(tiny, seed=0)
    save_reward_model(model, tokenizer, tmp_path / "rm", rows_of(sequences(2)))
    again, _ = new_reward_model(str(tmp_path / "rm"), seed=1)
    assert torch.equal(head_of(again).weight, head_of(model).weight)


# -- architectures without a classifier in the library ----------------------------------------------------------------


@pytest.fixture
def granite(tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(GRANITE).save_pretrained(tmp_path / "granite")
    byte_tokenizer().save_pretrained(tmp_path / "granite")
    return str(tmp_path / "granite")


def test_a_classifier_of_our_own_is_the_trunk_and_the_head(granite, tmp_path):
    model, tokenizer = new_reward_model(granite, seed=0)
    assert type(model).__name__ == "GraniteForSequenceClassification"
    tokens = sequences()
    found = score_sequences(model, rows_of(tokens))
    assert found.std() > 0.05
    save_reward_model(model, tokenizer, tmp_path / "rm", rows_of(tokens[:3]))
    loaded, _ = load_reward_model(str(tmp_path / "rm"))
    assert type(loaded) is type(model)
    torch.testing.assert_close(score_sequences(loaded, rows_of(tokens)), found)
    trunk, weights = AutoModel.from_pretrained(granite).eval(), load_file(tmp_path / "rm" / "model.safetensors")
    with torch.no_grad():
        known = [trunk(torch.tensor([ids])).last_hidden_state[0, -1] @ weights["score.weight"][0] for ids in tokens]
    torch.testing.assert_close(torch.stack(known), found, rtol=1e-4, atol=1e-4)
    model_again, _ = load_policy(granite)
    assert type(model_again).__name__ == "GraniteForCausalLM"


def test_a_classifier_of_our_own_is_trained_used_and_described(granite, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workspace(tmp_path)
    assert tether(f"{LINES['reward']} --quiet --model {granite} --out rm") == 0
    assert "from tether.models.reward import load_reward_model" in (tmp_path / "rm" / "model" / "README.md").read_text()
    assert tether(f"{LINES['reward']} --quiet --lora-rank 2 --model {granite} --out lora") == 0
    line = f"{LINES['grpo']} --steps 1 --quiet --model {granite}"
    for judge in ("rm", "lora"):
        assert tether(f"{line} --reward {judge}/model --out {judge}-run") == 0


def test_a_part_of_a_larger_model_gets_no_classifier_of_our_own():
    assert in_the_library(WhisperConfig())
