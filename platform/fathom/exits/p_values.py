"""Evidence against "the mean loss is above δ", from losses in [0, 1]: two p-values."""

from __future__ import annotations

import math
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, logsumexp

Floats = NDArray[np.float64]

_STAKES: Floats = np.geomspace(0.02, 0.999, 10)


class Bound(StrEnum):
    """Which p-value; both are valid for every sample size and every distribution."""

    HOEFFDING_BENTKUS = "hoeffding_bentkus"  # sees the mean alone: takes every loss for 0 or 1
    BETTING = "betting"  # sees each loss: tighter where they vary little


def hoeffding_bentkus(risk_hat: ArrayLike, n: int, delta: float) -> Floats:
    """p-value of "the mean loss is above delta", for n independent losses in [0, 1].

    min(exp(-n h(min(r, δ), δ)), e P(Binomial(n, δ) <= ceil(n r))), h the Kullback-Leibler
    divergence of Bernoulli distributions (Bates et al. 2021, "Distribution-free, risk-controlling
    prediction sets", section 3.1).

    Args:
        risk_hat: mean losses r, any shape.
    """
    r = np.asarray(risk_hat, dtype=np.float64)
    hoeffding = np.exp(-n * divergence(np.minimum(r, delta), delta))
    # A mean of whole losses must not be lifted to the next count by rounding.
    bentkus = math.e * bdtr(np.ceil(n * r - 1e-9), n, delta)
    return np.asarray(np.minimum(np.minimum(hoeffding, bentkus), 1.0))


def betting(losses: ArrayLike, delta: float) -> Floats:
    """p-value of "the mean loss is above delta", from each loss.

    1 / E with E the mean, over stakes ν in (0, 1 / (1 - δ)), of the product of 1 + ν (δ - L_i):
    where the mean loss is at least δ, E has an expectation of at most 1, and by Markov's
    inequality P(1 / E <= p) <= p (Waudby-Smith and Ramdas 2024, section 4). The order of the
    losses does not matter.

    Args:
        losses: [n, ...] in [0, 1], independent along the first axis.

    Returns:
        [...] float64.
    """
    values = np.asarray(losses, dtype=np.float64)
    stakes = _STAKES / (1 - delta)
    wealth = np.stack([np.log1p(v * (delta - values)).sum(axis=0) for v in stakes])
    log_mean = logsumexp(wealth, axis=0) - math.log(len(stakes))
    return np.asarray(np.exp(np.minimum(-log_mean, 0.0)))


def divergence(a: ArrayLike, b: float) -> Floats:
    """Kullback-Leibler divergence of Bernoulli(a) from Bernoulli(b), in nats; b in (0, 1)."""
    p = np.asarray(a, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        first = np.where(p > 0, p * np.log(p / b), 0.0)
        second = np.where(p < 1, (1 - p) * np.log((1 - p) / (1 - b)), 0.0)
    return np.asarray(first + second)
