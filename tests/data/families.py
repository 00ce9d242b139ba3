"""Chat templates in the published formats of eleven families, with tokenizers of one token per byte.

A family's golden strings are written from the format's description, not from the template; :func:`golden` turns them
into ids without the tokenizer's own code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tokenizers import AddedToken, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tiny import byte_tokenizer

USER, MODEL = "Hi?", "Yo."


@dataclass(frozen=True, kw_only=True)
class Family:
    """A format. ``{s}`` stands for the system turn's text in :attr:`system`."""

    specials: tuple[str, ...]
    bos: str | None
    eos: str
    template: str
    opened: str
    """A user's turn, and the model's opened."""
    emitted: str = MODEL
    """What the model writes before its EOS."""
    between: str
    """From the EOS of the model's first turn to its second one, opened; after another user's turn."""
    system: str | None
    """A system turn in front of the user's, and the model's turn opened; None where the template refuses one."""


def tokenizer_of(family: Family) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(text, special=True, normalized=False) for text in family.specials]}
    )
    tokenizer.bos_token, tokenizer.eos_token = family.bos, family.eos
    tokenizer.chat_template = family.template
    return tokenizer


def golden(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    """The ids of a text: special tokens are one each, all else is bytes, in the order of the alphabet."""
    specials = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printed = {byte: 3 + alphabet.index(letter) for byte, letter in byte_letters().items()}
    ids: list[int] = []
    for part in re.split("(" + "|".join(map(re.escape, specials)) + ")", text):
        found = tokenizer.get_added_vocab().get(part)
        ids += [found] if found is not None else [printed[byte] for byte in part.encode()]
    return tuple(ids)


def byte_letters() -> dict[int, str]:
    """The letter that GPT-2's byte-level alphabet writes for each byte: itself where it can be seen, else the next of
    those from U+0100 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in seen}
    hidden = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = {
    "llama 2": Family(
        specials=("<s>", "</s>"),
        bos="<s>",
        eos="</s>",
        template=(
            "{% if messages[0].role == 'system' %}{% set sys = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
            "{% set rest = messages[1:] %}{% else %}{% set sys = '' %}{% set rest = messages %}{% endif %}"
            "{% for m in rest %}{% if m.role == 'user' %}"
            "{{ bos_token + '[INST] ' + (sys if loop.first else '') + m.content + ' [/INST]' }}"
            "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
        ),
        opened="<s>[INST] Hi? [/INST]",
        emitted=" Yo. ",
        between="</s><s>[INST] More. [/INST]",
        system="<s>[INST] <<SYS>>\n{s}\n<</SYS>>\n\nHi? [/INST]",
    ),
    "llama 3": Family(
        specials=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        template=(
            "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
            "{{ m.content | trim }}<|eot_id|>{% endfor %}"
            "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
        ),
        opened=(
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        between=(
            "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nMore.<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        system=(
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{s}<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
    ),
    "qwen 2.5": Family(
        specials=("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
        bos=None,
        eos="<|im_end|>",
        template=(
            "{% if messages[0].role != 'system' %}<|im_start|>system\nBe of use.<|im_end|>\n{% endif %}" + CHATML
        ),
        opened="<|im_start|>system\nBe of use.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n",
        between="<|im_end|>\n<|im_start|>user\nMore.<|im_end|>\n<|im_start|>assistant\n",
        system="<|im_start|>system\n{s}<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "chatml (smollm 2)": Family(
        specials=("<|im_start|>", "<|im_end|>"),
        bos="<|im_start|>",
        eos="<|im_end|>",
        template=CHATML,
        opened="<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n",
        between="<|im_end|>\n<|im_start|>user\nMore.<|im_end|>\n<|im_start|>assistant\n",
        system="<|im_start|>system\n{s}<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "gemma 2": Family(
        specials=("<bos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<end_of_turn>",
        template=(
            "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
            "{% endif %}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
            "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
            "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
        ),
        opened="<bos><start_of_turn>user\nHi?<end_of_turn>\n<start_of_turn>model\n",
        between="<end_of_turn>\n<start_of_turn>user\nMore.<end_of_turn>\n<start_of_turn>model\n",
        system=None,
    ),
    "gemma 3": Family(
        specials=("<bos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<end_of_turn>",
        template=(
            "{{ bos_token }}{% set sys = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
            "{% for m in messages if m.role != 'system' %}"
            "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
            "{{ (sys if loop.first else '') + m.content | trim }}<end_of_turn>\n{% endfor %}"
            "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
        ),
        opened="<bos><start_of_turn>user\nHi?<end_of_turn>\n<start_of_turn>model\n",
        between="<end_of_turn>\n<start_of_turn>user\nMore.<end_of_turn>\n<start_of_turn>model\n",
        system="<bos><start_of_turn>user\n{s}\n\nHi?<end_of_turn>\n<start_of_turn>model\n",
    ),
    "mistral 0.3": Family(
        specials=("<s>", "</s>", "[INST]", "[/INST]"),
        bos="<s>",
        eos="</s>",
        template=(
            "{{ bos_token }}{% set sys = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
            "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
            "[INST] {{ (sys if loop.last or loop.nextitem is undefined else '') + m.content }}[/INST]"
            "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        ),
        opened="<s>[INST] Hi?[/INST]",
        emitted=" Yo.",
        between="</s>[INST] More.[/INST]",
        system="<s>[INST] {s}\n\nHi?[/INST]",
    ),
    "phi 3": Family(
        specials=("<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        bos="<s>",
        eos="<|end|>",
        template=(
            "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
        ),
        opened="<|user|>\nHi?<|end|>\n<|assistant|>\n",
        between="<|end|>\n<|user|>\nMore.<|end|>\n<|assistant|>\n",
        system="<|system|>\n{s}<|end|>\n<|user|>\nHi?<|end|>\n<|assistant|>\n",
    ),
    "olmo 2": Family(
        specials=("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>"),
        bos="<|endoftext|>",
        eos="<|endoftext|>",
        template=(
            "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
            "{{ eos_token if m.role == 'assistant' else '' }}{{ '\n' if not loop.last or m.role != 'assistant' }}"
            "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
        ),
        opened="<|endoftext|><|user|>\nHi?\n<|assistant|>\n",
        between="<|endoftext|>\n<|user|>\nMore.\n<|assistant|>\n",
        system="<|endoftext|><|system|>\n{s}\n<|user|>\nHi?\n<|assistant|>\n",
    ),
    "granite 3": Family(
        specials=("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
        bos="<|end_of_text|>",
        eos="<|end_of_text|>",
        template=(
            "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
        ),
        opened="<|start_of_role|>user<|end_of_role|>Hi?<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
        between=(
            "<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>More.<|end_of_text|>\n"
            "<|start_of_role|>assistant<|end_of_role|>"
        ),
        system=(
            "<|start_of_role|>system<|end_of_role|>{s}<|end_of_text|>\n"
            "<|start_of_role|>user<|end_of_role|>Hi?<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
        ),
    ),
    "command r": Family(
        specials=(
            "<BOS_TOKEN>",
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
        ),
        bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>",
        template=(
            "{% set names = {'user': 'USER', 'assistant': 'CHATBOT', 'system': 'SYSTEM'} %}{{ bos_token }}"
            "{% for m in messages %}<|START_OF_TURN_TOKEN|><|{{ names[m.role] }}_TOKEN|>{{ m.content | trim }}"
            "<|END_OF_TURN_TOKEN|>{% endfor %}"
            "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
        ),
        opened=(
            "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi?<|END_OF_TURN_TOKEN|>"
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
        ),
        between=(
            "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>More.<|END_OF_TURN_TOKEN|>"
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
        ),
        system=(
            "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{s}<|END_OF_TURN_TOKEN|>"
            "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
        ),
    ),
}
THINKING = {
    "qwen 3": Family(
        specials=("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
        bos=None,
        eos="<|im_end|>",
        template=(
            "{% for m in messages %}<|im_start|>{{ m.role }}\n"
            "{% set said = m.content %}{% if m.role == 'assistant' and '</think>' in said and not loop.last %}"
            "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
            "{% if m.role == 'assistant' and loop.last and '</think>' not in said %}"
            "{% set said = '<think>\n\n</think>\n\n' + said %}{% endif %}{{ said }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n"
            "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
            "{% endif %}"
        ),
        opened="<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n",
        emitted="<think>\n\n</think>\n\nYo.",
        between="<|im_end|>\n<|im_start|>user\nMore.<|im_end|>\n<|im_start|>assistant\n",
        system="<|im_start|>system\n{s}<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "deepseek r1": Family(
        specials=("<bos>", "<eos>", "<|User|>", "<|Assistant|>", "<think>", "</think>"),
        bos="<bos>",
        eos="<eos>",
        template=(
            "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
            "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
            "{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
        ),
        opened="<bos><|User|>Hi?<|Assistant|><think>\n",
        between="<eos><|User|>More.<|Assistant|><think>\n",
        system="<bos>{s}<|User|>Hi?<|Assistant|><think>\n",
    ),
}
"""Those whose models reason before they answer."""
