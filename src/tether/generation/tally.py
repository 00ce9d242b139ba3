"""What a call of the engine does, counted, and the room that a rollout has."""

from __future__ import annotations

from dataclasses import dataclass

from tether.types import Metrics


@dataclass
class Tally:
    """What a call of :meth:`tether.generation.engine.Engine.generate` did."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    new_tokens: int = 0
    decode_seconds: float = 0.0
    row_steps: int = 0
    """Rows in use, summed over decoding steps."""
    slot_steps: int = 0
    """Rows there was room for, summed over decoding steps."""
    cache_bytes: int = 0
    """The most that was allocated."""
    shown_tokens: int = 0
    """Tokens that were run because an environment showed something, but for the last one of each turn's, which
    decoding steps run."""

    def metrics(self) -> Metrics:
        return {
            "sampling/prefill_tokens_per_second": self.prompt_tokens / max(self.prefill_seconds, 1e-9),
            "sampling/decode_tokens_per_second": self.new_tokens / max(self.decode_seconds, 1e-9),
            "sampling/slot_occupancy": self.row_steps / max(self.slot_steps, 1),
            "sampling/cache_gib": self.cache_bytes / 2**30,
        }


@dataclass(frozen=True, kw_only=True)
class Room:
    """The size of a rollout's cache: completions and prompts at once, and tokens of each."""

    rows: int
    row_tokens: int
    slots: int
    slot_tokens: int
