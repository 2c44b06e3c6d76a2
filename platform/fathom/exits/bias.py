"""What an adaptive threshold would have learned, had it seen part of a trace only.

A row that leaves at the exit is not compared with the deep stage, or later, or never: the rows that
a policy learns from are chosen by its own threshold. This replays a trace, of which the truth is
known, through what different systems see, to set their λ beside the one that sees all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fathom.exits.beta_mixture import GRID, START, ZETA, BetaMixture, fit_em, fit_moments
from fathom.exits.histogram import ConfidenceHistogram

Floats = NDArray[np.float64]

_PROBE_STREAM = 0x70726F62


class View(StrEnum):
    """Which rows get a label."""

    STACKS = "stacks"  # the official code: a stack of exits with the row that ended it
    STAYED = "stayed"  # rows that did not leave: all that is known where nothing verifies exits
    WEIGHTED = "weighted"  # these, and probes of exits at weight 1 / rate
    LATENT = "latent"  # these, probes at weight 1, and all other exits without a label
    ALL = "all"  # every row: the oracle


class Method(StrEnum):
    """How the mixture is fitted."""

    MOMENTS = "moments"
    EM = "em"


@dataclass(frozen=True, slots=True)
class Replay:
    """A policy's way through a trace.

    Attributes:
        thresholds: [n] float64 λ that each row met. exits: [n] bool, rows that left (probes did
            not). labelled: [n] bool, rows that the policy learned the truth of.
        histogram, mixture: at the end.
    """

    thresholds: Floats
    exits: NDArray[np.bool_]
    labelled: NDArray[np.bool_]
    histogram: ConfidenceHistogram
    mixture: BetaMixture


def replay(
    confidence: ArrayLike,
    agrees: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    view: View,
    method: Method,
    probe_rate: float = 0.02,
    half_life: float | None = None,
    refit_every: int = 32,
    start: float = START,
    zeta: float = ZETA,
    grid: ArrayLike = GRID,
    seed: int = 0,
) -> Replay:
    """Run an adaptive threshold over the rows of a trace, in their order.

    Args:
        confidence: [n] float in [0, 1]; one that is not a number stays and teaches nothing.
        agrees: [n] bool. groups: [n] sequence of each row, whose rows stand together; a stack that
            is not flushed at its end is lost. None: one sequence. Only ``View.STACKS`` looks.
        probe_rate: of ``WEIGHTED`` and ``LATENT``, in (0, 1].
        half_life: see ``ConfidenceHistogram``. refit_every: rows between fits.
        start: λ at first. seed: of the probes.

    Raises:
        ValueError: for arrays that do not fit each other, or a probe_rate out of range.
    """
    c, y = np.asarray(confidence, dtype=np.float64), np.asarray(agrees, dtype=bool)
    names = np.zeros(len(c)) if groups is None else np.asarray(groups)
    if c.ndim != 1 or y.shape != c.shape or names.shape != c.shape:
        raise ValueError(
            f"confidence, agrees and groups must be [rows], got {c.shape}, {y.shape}, "
            f"{names.shape}."
        )
    if not 0 < probe_rate <= 1:
        raise ValueError(f"probe_rate must be in (0, 1], got {probe_rate}.")
    # Apart from the stream of a trace that was simulated from the same seed.
    probes = np.random.default_rng((seed, _PROBE_STREAM)).random(len(c)) < probe_rate
    if view not in (View.WEIGHTED, View.LATENT):
        probes[:] = False
    ends = np.ones(len(c), dtype=bool)
    ends[:-1] = names[1:] != names[:-1]
    histogram, mixture = ConfidenceHistogram(half_life=half_life), None
    thresholds, exits = np.empty(len(c)), np.zeros(len(c), dtype=bool)
    labelled = np.zeros(len(c), dtype=bool)
    stack: list[int] = []
    threshold = start

    def learn(row: int, weight: float = 1.0) -> None:
        histogram.add_one(float(c[row]), bool(y[row]), weight)
        labelled[row] = not math.isnan(c[row])

    for row in range(len(c)):
        if row and row % refit_every == 0:
            mixture = _fit(histogram, method, mixture)
            threshold = mixture.threshold(zeta, grid, start)
        thresholds[row] = threshold
        sure = bool(c[row] > threshold)
        exits[row] = sure and not probes[row]
        if view is View.STACKS:
            stack.append(row)
            # The official code learns from flushes that have exits to catch up with.
            if not exits[row] and len(stack) > 1:
                for each in stack:
                    learn(each)
            if not exits[row] or ends[row]:
                stack = []
        elif view is View.ALL or not sure:
            learn(row)
        elif probes[row]:
            learn(row, 1 / probe_rate if view is View.WEIGHTED else 1.0)
        elif view is View.LATENT:
            histogram.add_one(float(c[row]))
    return Replay(thresholds, exits, labelled, histogram, _fit(histogram, method, mixture))


def _fit(
    histogram: ConfidenceHistogram, method: Method, earlier: BetaMixture | None
) -> BetaMixture:
    return fit_moments(histogram) if method is Method.MOMENTS else fit_em(histogram, earlier)
