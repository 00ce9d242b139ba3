"""How often one of two would win if both wrote equally much."""

from __future__ import annotations

import torch
from torch import Tensor

PRIOR = 2.5
"""Standard deviation of the normal prior of the length's coefficient, in logits: the scale that Gelman et al. 2008,
arXiv 0901.4011, give weakly informative priors of logistic regression."""
FURTHEST = 1.0
"""Logits by which a step of Newton's method may move any prediction."""
TOLERANCE, MOST_STEPS = 1e-6, 200
"""Logits of the last step: the error left behind is of the order of its square."""


def length_controlled_win_rate(wins: Tensor, longer_by: Tensor, weights: Tensor, *, prior: float = PRIOR) -> Tensor:
    """The share of comparisons that would be won at equal length, for each of R weightings of them: [R] float64.

    ``wins`` [N] is 1 for a comparison won, 1/2 for a tie, 0 for one lost; ``longer_by`` [N] is by how much the own text
    is longer than the rival's; ``weights`` [R, N] are 0 or more, and say how much each comparison counts. With

        P(win) = sigmoid(theta + phi z),    z = tanh(longer_by / std(longer_by)),

    theta and phi minimise the weighted sum of the log losses plus phi^2 / (2 prior^2), and the result is
    sigmoid(theta). theta has no prior, so that without differences in length, or with one and the same everywhere, the
    result is the weighted mean of ``wins``; it is that too where all are won, or all lost. Changing sides gives one
    minus the result.

    This is the regression of Dubois et al. 2024, arXiv 2404.04475, for one pair of models and without the term for how
    hard each prompt is, whose values come from fits to many models on the same prompts. Their code keeps phi small by
    adding judged answers of one model that were written to be long or short; here the prior does.
    """
    y, z = wins.double(), standardised(longer_by.double())
    w = weights.double()
    share = (w @ y) / w.sum(1)
    mixed = (share > 0) & (share < 1) & bool(z.any())
    share[mixed] = intercepts(y, z, w[mixed], share[mixed], prior).sigmoid()
    return share


def standardised(longer_by: Tensor) -> Tensor:
    """tanh of the differences [N] over their standard deviation, with N - 1; 0 where there is no deviation."""
    spread = longer_by.std() if len(longer_by) > 1 else longer_by.new_zeros(())
    return (longer_by / spread).tanh() if spread > 0 else torch.zeros_like(longer_by)


def intercepts(y: Tensor, z: Tensor, w: Tensor, share: Tensor, prior: float) -> Tensor:
    """theta [R] of each row of ``w`` [R, N], by Newton's method from phi = 0 and the mean ``share`` [R] of ``y``.

    A longer step is shortened until no prediction moves by more than :data:`FURTHEST`. Within that the curvature grows
    by a factor of e at most, so that every step lowers the loss (Bach 2010, arXiv 0910.4627).
    """
    theta, phi = share.logit(), torch.zeros_like(share)
    for _ in range(MOST_STEPS):
        p = torch.addcmul(theta.unsqueeze(1), phi.unsqueeze(1), z.unsqueeze(0)).sigmoid()
        error, curvature = w * (p - y), w * p * (1 - p)
        slope_theta, slope_phi = error.sum(1), error @ z + phi / prior**2
        a, b, c = curvature.sum(1), curvature @ z, curvature @ z.square() + prior**-2
        by_theta = (c * slope_theta - b * slope_phi) / (a * c - b.square())
        by_phi = (a * slope_phi - b * slope_theta) / (a * c - b.square())
        moved = by_theta.abs() + by_phi.abs()
        scale = (FURTHEST / moved).clamp(max=1.0)
        theta, phi = theta - scale * by_theta, phi - scale * by_phi
        if not (moved > TOLERANCE).any():
            return theta
    raise ArithmeticError(f"the length-controlled win rate did not converge in {MOST_STEPS} steps")
