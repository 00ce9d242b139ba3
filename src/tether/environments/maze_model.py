"""A small model that reads mazes and nothing else, with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tether.environments.maze import LARGEST, MOVES, cell_name

EOS, UNKNOWN = "<eos>", "<unk>"
CONTEXT = 192


def maze_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of a grid, per move and per name of a cell."""
    cells = [cell_name((i, j)) for i in range(LARGEST) for j in range(LARGEST)]
    vocabulary = [EOS, UNKNOWN, "\n", ".", "#", "S", "G", *MOVES, *cells]
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-i][1-9]|[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=EOS, pad_token=EOS, unk_token=UNKNOWN)


def write_maze_model(path: Path, *, seed: int, width: int = 128, layers: int = 4) -> None:
    """The model in the layout of Hugging Face. Its positions are learned, one vector per place in the text, so that
    what is in a cell of the grid can be found by the cell's name."""
    tokenizer = maze_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_positions=CONTEXT,
                n_embd=width,
                n_layer=layers,
                n_head=width // 32,
                activation_function="gelu_pytorch_tanh",  # that of GPT-2, in one kernel
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=0,
                pad_token_id=0,
            )
        )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
