"""FREE's adaptive threshold: two beta densities of the confidence, and where the better one wins.

One density is of rows whose draft the deep stage agreed with, one of the others. Two ways to fit
them stand here side by side. ``fit_moments`` is what the official code runs (util/bmm.py of
raymin0223/fast_robust_early_exit, its supervised branch): moments of each class, no mixture
weights. ``fit_em`` is expectation-maximization with weights, in which rows that nobody looked at
are latent.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaln, expit, psi, zeta

from fathom.exits.histogram import ConfidenceHistogram, Kind

Floats = NDArray[np.float64]
Found = TypeVar("Found")
Steps = Generator[None, None, Found]
"""Work in small pieces, for who must not stop for long: each ``next`` does one."""

ZETA = 0.4
START = 0.9
"""λ before there is anything to fit."""
GRID: Floats = np.linspace(0.3, 0.9, 10)
_CLIP = 1e-4
_LEAKED = 1e-4 / (0.2 + 1e-4)
"""Weight of a row in the other class's moments: the official code floors responsibilities."""
_PRIOR_ROWS = 1.0
"""Of ``fit_em``, a class: made-up rows, spread evenly over [0, 1], that keep densities finite."""
_MOST = 1e5


@dataclass(frozen=True, slots=True)
class Beta:
    """A beta distribution on [0, 1]: alpha, beta > 0."""

    alpha: float
    beta: float

    @property
    def mean(self) -> float:
        """The mean, alpha / (alpha + beta)."""
        return self.alpha / (self.alpha + self.beta)

    def log_density(self, x: ArrayLike) -> Floats:
        """Natural log of the density at x in (0, 1), clipped to [1e-4, 1 - 1e-4]."""
        at = np.clip(np.asarray(x, dtype=np.float64), _CLIP, 1 - _CLIP)
        return self._of_logs(np.log(at), np.log1p(-at))

    def _of_logs(self, log_x: Floats, log_y: Floats) -> Floats:
        """``log_density`` at x, from log x and log(1 - x)."""
        shape = (self.alpha - 1) * log_x + (self.beta - 1) * log_y
        return np.asarray(shape - betaln(self.alpha, self.beta))


@dataclass(frozen=True, slots=True)
class BetaMixture:
    """Two fitted densities.

    Attributes:
        disagrees, agrees: of either kind of rows.
        weight: share of the rows that agree; 0.5 where the method knows no weights.
        method: "moments" or "em".
        rows: weights of the rows that it was fitted to, by ``Kind``.
        log_likelihood: of these rows, in nats; each at its bin's centre, so it compares fits of
            one histogram only.
        iterations: of EM; 1 for moments.
        fallback: why no threshold follows from it, empty where one does.
    """

    disagrees: Beta
    agrees: Beta
    weight: float
    method: str
    rows: tuple[float, float, float]
    log_likelihood: float
    iterations: int
    fallback: str = ""

    def densities(self, x: ArrayLike) -> tuple[Floats, Floats]:
        """Densities of the rows that disagree and of those that agree, without weights, at x."""
        return np.exp(self.disagrees.log_density(x)), np.exp(self.agrees.log_density(x))

    def posterior(self, x: ArrayLike) -> Floats:
        """Probability that a row of confidence x agrees, by densities and weight."""
        odds = np.log(self.weight) - np.log1p(-self.weight)
        return np.asarray(expit(odds + self.agrees.log_density(x) - self.disagrees.log_density(x)))

    def threshold(self, zeta: float = ZETA, grid: ArrayLike = GRID, start: float = START) -> float:
        """λ: the smallest value of a grid from which on the posterior is above zeta.

        Of ``moments``, the component with the larger mean counts as the one that agrees, and λ
        stands as many places below the grid's end as values pass, as in the official code; that
        is the same where the posterior rises.

        Args:
            grid: [n] ascending. start: given back after a fallback.

        Returns:
            λ; the grid's last value where none passes.
        """
        if self.fallback:
            return start
        values = np.asarray(grid, dtype=np.float64)
        chance = self.posterior(values)
        if self.method == "moments":
            if self.disagrees.mean > self.agrees.mean:
                chance = 1 - chance
            passing = int((chance > zeta).sum())
        else:
            passing = int(np.cumprod((chance > zeta)[::-1]).sum())
        return float(values[min(len(values) - passing, len(values) - 1)])


def fit_moments(histogram: ConfidenceHistogram) -> BetaMixture:
    """Moments of each class (free.md): with mean m and variance s² of its confidences,

        alpha = m (m (1 - m) / s² - 1),  beta = alpha (1 - m) / m.

    Rows without a label are left out. As in the official code each row also counts 5e-4 in the
    other class, so that with one class alone both densities are the same, every value of the grid
    passes and λ falls to its floor.
    """
    disagree, agree, _ = counts = histogram.counts
    rows = _totals(counts)
    if rows[0] + rows[1] <= 0:
        return _fallback("moments", rows, "no row has been compared with the deep stage")
    x = np.clip(histogram.centres, _CLIP, 1 - _CLIP)
    fits = [
        _by_moments(x, (1 - _LEAKED) * own + _LEAKED * other)
        for own, other in ((disagree, agree), (agree, disagree))
    ]
    if fits[0] is None or fits[1] is None:
        return _fallback("moments", rows, "the confidences of one kind of rows have no spread")
    low, high = fits[0].log_density(x), fits[1].log_density(x)
    likelihood = float((disagree * low + agree * high).sum())
    return BetaMixture(fits[0], fits[1], 0.5, "moments", rows, likelihood, 1)


def fit_em(
    histogram: ConfidenceHistogram,
    start: BetaMixture | None = None,
    *,
    least_rows: float = 20,
    tolerance: float = 1e-5,
    most_iterations: int = 200,
) -> BetaMixture:
    """Fit by expectation-maximization; see ``em_steps``, whose pieces it does all at once."""
    steps = em_steps(
        histogram,
        start,
        least_rows=least_rows,
        tolerance=tolerance,
        most_iterations=most_iterations,
    )
    while True:
        try:
            next(steps)
        except StopIteration as done:
            mixture: BetaMixture = done.value
            return mixture


def em_steps(
    histogram: ConfidenceHistogram,
    start: BetaMixture | None = None,
    *,
    least_rows: float = 20,
    tolerance: float = 1e-5,
    most_iterations: int = 200,
) -> Steps[BetaMixture]:
    """Expectation-maximization of w f_agrees + (1 - w) f_disagrees, in pieces.

    The E-step splits a row without a label by the posterior; labelled rows are what they are. That
    is right when, of two rows of one confidence, neither was likelier to be labelled for agreeing:
    labels missing at random given the confidence, which exits by threshold with random probes are.
    The M-step maximizes: w is the share, and alpha and beta solve
    psi(alpha) - psi(alpha + beta) = mean log c, psi(beta) - psi(alpha + beta) = mean log(1 - c)
    by Newton's method.

    Args:
        start: a mixture fitted a little earlier, from where it is a few steps only.
        least_rows: weight of labelled rows below which it falls back.
        tolerance: gain of the log likelihood a row at which it stops. With all rows labelled one
            iteration is exact.

    Yields:
        None between pieces of some ten microseconds. What the histogram holds at the first one is
        what counts.
    """
    counts = histogram.counts
    rows = _totals(counts)
    labelled = rows[0] + rows[1]
    if labelled < least_rows:
        why = f"{labelled:.1f} rows were compared with the deep stage, {least_rows:g} are needed"
        return _fallback("em", rows, why)
    logs = _logs_of_centres(histogram.bins)
    known, latent = counts[:2], counts[2]
    if start is None or start.fallback:
        parts, split = [Beta(1.0, 1.0), Beta(1.0, 1.0)], known  # labelled rows: the first guess
    else:
        parts = [start.disagrees, start.agrees]
        split = known
        if rows[2]:
            split = known + latent * _shares(_joint(parts, start.weight, logs))
    yield
    previous, log_likelihood, weight, iterations = -np.inf, -np.inf, 0.5, 0
    while iterations < most_iterations:
        iterations += 1
        masses = split.sum(axis=1)
        weight = float((masses[1] + _PRIOR_ROWS) / (masses.sum() + 2 * _PRIOR_ROWS))
        # Of the uniform density both means of logs are -1.
        means = (split @ logs.T - _PRIOR_ROWS) / (masses + _PRIOR_ROWS)[:, None]
        low = yield from _by_likelihood(means[0], parts[0])
        high = yield from _by_likelihood(means[1], parts[1])
        parts = [low, high]
        joint = _joint(parts, weight, logs)
        log_likelihood = float((known * joint).sum())
        if not rows[2]:
            break  # every row is labelled: there is nothing to expect
        log_likelihood += float((latent * np.logaddexp(joint[0], joint[1])).sum())
        penalized = log_likelihood + _log_prior(parts, weight)
        if penalized - previous < tolerance * sum(rows):
            break
        previous = penalized
        split = known + latent * _shares(joint)
        yield
    why = ""
    if parts[1].mean <= parts[0].mean:
        why = "rows that agree are not the more confident ones"
    return BetaMixture(parts[0], parts[1], weight, "em", rows, log_likelihood, iterations, why)


@lru_cache(maxsize=8)
def _logs_of_centres(bins: int) -> Floats:
    """[2, bins]: log c and log(1 - c) of a histogram's centres."""
    x = np.clip(ConfidenceHistogram(bins).centres, _CLIP, 1 - _CLIP)
    return np.stack([np.log(x), np.log1p(-x)])


def _joint(parts: list[Beta], weight: float, logs: Floats) -> Floats:
    """[2, bins] log of weight times density, of rows that disagree and of those that agree."""
    weights = (float(np.log1p(-weight)), float(np.log(weight)))
    pairs = zip(parts, weights, strict=True)
    return np.stack([part._of_logs(logs[0], logs[1]) + share for part, share in pairs])


def _shares(joint: Floats) -> Floats:
    """[2, bins] posterior probabilities of either class."""
    chance = expit(joint[1] - joint[0])
    return np.stack([1 - chance, chance])


def _totals(counts: Floats) -> tuple[float, float, float]:
    totals = counts.sum(axis=1)
    return (
        float(totals[Kind.DISAGREES]),
        float(totals[Kind.AGREES]),
        float(totals[Kind.UNLABELLED]),
    )


def _fallback(method: str, rows: tuple[float, float, float], why: str) -> BetaMixture:
    return BetaMixture(Beta(1.0, 2.0), Beta(2.0, 1.0), 0.5, method, rows, 0.0, 0, why)


def _by_moments(x: Floats, weight: Floats) -> Beta | None:
    total = weight.sum()
    mean = float(weight @ x / total)
    variance = float(weight @ (x - mean) ** 2 / total)
    # No spread, or more than a beta can have: two points at the ends.
    if variance <= 1e-12 or variance >= mean * (1 - mean):
        return None
    alpha = mean * (mean * (1 - mean) / variance - 1)
    return Beta(alpha, alpha * (1 - mean) / mean)


def _by_likelihood(means: Floats, start: Beta) -> Steps[Beta]:
    """Maximum likelihood from the means of log c and log(1 - c); yields after each step.

    The objective is concave in (alpha, beta), and Newton's steps are halved until it rises.
    """
    log_x, log_y = float(means[0]), float(means[1])

    def value(a: float, b: float) -> float:
        return (a - 1) * log_x + (b - 1) * log_y - float(betaln(a, b))

    a, b = start.alpha, start.beta
    now = value(a, b)
    for _ in range(50):
        both = float(psi(a + b))
        slope_a, slope_b = log_x - float(psi(a)) + both, log_y - float(psi(b)) + both
        # zeta(2, x) is the trigamma function; the Hessian is [[t - t_a, t], [t, t - t_b]].
        t, t_a, t_b = float(zeta(2, a + b)), float(zeta(2, a)), float(zeta(2, b))
        determinant = t_a * t_b - t * (t_a + t_b)
        step_a = (slope_a * (t_b - t) + slope_b * t) / determinant
        step_b = (slope_b * (t_a - t) + slope_a * t) / determinant
        size = 1.0
        while size > 1e-8:
            new_a, new_b = min(a + size * step_a, _MOST), min(b + size * step_b, _MOST)
            if new_a > 0 and new_b > 0 and (new := value(new_a, new_b)) >= now:
                break
            size /= 2
        else:
            break
        moved = abs(new_a - a) / a + abs(new_b - b) / b
        a, b, now = new_a, new_b, new
        yield
        if moved < 1e-7:
            break
    return Beta(a, b)


def _log_prior(parts: list[Beta], weight: float) -> float:
    """What the made-up rows add to the objective; -1 is their mean log c and log(1 - c)."""
    densities = sum(-(part.alpha + part.beta - 2) - betaln(part.alpha, part.beta) for part in parts)
    return float(_PRIOR_ROWS * (densities + np.log(weight) + np.log1p(-weight)))
