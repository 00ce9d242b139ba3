"""DPO: ``run`` does all of it in one call, and the rest is for a loop of your own."""

from __future__ import annotations

from tether.algorithms.dpo import Config, ReferredPair, State, evaluate, judge, pair_logprobs, refer, step, steps
from tether.api.training import runner

__all__ = ["Config", "ReferredPair", "State", "evaluate", "judge", "pair_logprobs", "refer", "run", "step", "steps"]

run = runner("dpo", __name__)
