"""Draw where GRPO comes to rest in both units of ``--kl-units``: writes docs/kl_units.png.

    python -m scripts.kl_units

A reward of 0 or 1, which the reference earns with probability p_0. With A = (r - mean) / sigma and the KL at weight w,
a fixed point of the expected update is pi = pi_ref exp(r / (w sigma)) / Z, where sigma = sqrt(p (1 - p)) is the spread
of the reward under pi itself:

    units of the reward     w = beta / sigma:    logit p = logit p_0 + 1 / beta
    units of the advantage  w = beta:            logit p = logit p_0 + 1 / (beta sqrt(p (1 - p)))
"""

from __future__ import annotations

import math
from pathlib import Path

from tether.report.plots import COLOURS, Panel, Series, figure

BASE_RATE = 0.3
FIGURE = Path(__file__).resolve().parents[1] / "docs" / "kl_units.png"


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def in_reward_units(beta: float) -> float:
    """The probability of a reward of 1 at the fixed point."""
    return sigmoid(logit(BASE_RATE) + 1 / beta)


def in_advantage_units(beta: float) -> float | None:
    """The same; the fixed point that training reaches from the reference, or None where there is none below 1."""
    steps = 100_000
    for i in range(steps):
        p = BASE_RATE + (1 - BASE_RATE) * i / steps
        if logit(p) >= logit(BASE_RATE) + 1 / (beta * math.sqrt(p * (1 - p))):
            return p
    return None


def weakest_hold() -> float:
    """The smallest beta with a fixed point in units of the advantage: 1 / max over lambda of lambda sigma(lambda), with
    p(lambda) = sigmoid(logit p_0 + lambda)."""
    best = max(
        lam * math.sqrt(p * (1 - p)) for lam in (i / 1000 for i in range(1, 10_000)) if (p := in_reward_units(1 / lam))
    )
    return 1 / best


def main() -> None:
    betas = [0.05 * i for i in range(1, 61)]
    advantage = [(beta, p) for beta in betas if (p := in_advantage_units(beta)) is not None]
    hold = weakest_hold()
    panel = Panel(
        title="Where GRPO with std scaling comes to rest (0/1 reward, base rate 0.3)",
        x_label="kl_coef",
        y_label="probability of a reward of 1",
        series=[
            Series(label="--kl-units reward", x=betas, y=[in_reward_units(b) for b in betas], colour=COLOURS[0]),
            Series(
                label="--kl-units advantage",
                x=[b for b, _ in advantage],
                y=[p for _, p in advantage],
                colour=COLOURS[1],
            ),
            Series(
                label=f"advantage, below {hold:.2f}: nothing holds the policy",
                x=[0.0, hold],
                y=[1.0, 1.0],
                colour=COLOURS[1],
                dashed=True,
            ),
            Series(label="the reference", x=[0, 3], y=[BASE_RATE] * 2, colour=COLOURS[6], dashed=True),
        ],
    )
    figure([panel], columns=1, width=6.5, height=3.6).savefig(FIGURE, dpi=150)
    print(f"wrote {FIGURE.name}; no fixed point below kl_coef {hold:.2f}")


if __name__ == "__main__":
    main()
