"""Digests by which a step that is repeated recognises its prompts, its requests and its completions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from tether.types import Prompt, RolloutGroup


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Of the tokens and the text of each prompt."""
    return digest([[list(prompt.ids), prompt.text] for prompt in prompts])


def completions_digest(groups: Sequence[RolloutGroup]) -> str:
    """Of the tokens of each completion."""
    return digest([[list(completion.ids) for completion in group.completions] for group in groups])


def digest(value: Any) -> str:
    """Of a value that JSON can hold, as 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
