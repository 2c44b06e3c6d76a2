"""Pareto fronts and hypervolumes of losses: smaller is better in every column."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from fathom.tuning.rows import Bools, Floats


def on_front(losses: ArrayLike) -> Bools:
    """Which rows no other row dominates; of equal rows the first alone.

    A row dominates another if it is no worse in every column and better in one.

    Args:
        losses: [n, d].

    Returns:
        [n].
    """
    values = np.asarray(losses, np.float64)
    found = np.zeros(len(values), bool)
    for row, own in enumerate(values):
        no_worse = (values <= own).all(axis=1)
        dominated = (no_worse & (values < own).any(axis=1)).any()
        found[row] = not dominated and not (values[:row] == own).all(axis=1).any()
    return found


def hypervolume(losses: ArrayLike, reference: ArrayLike) -> float:
    """Volume that rows dominate below a reference point (Zitzler and Thiele 1999), exactly.

    Slices along the first column: between two neighbouring values of it, the volume is the
    slice's width times the hypervolume of the other columns of all rows to its left.

    Args:
        losses: [n, d]; a row that is not below the reference in every column adds nothing.
        reference: [d].
    """
    limit = np.asarray(reference, np.float64)
    values = np.asarray(losses, np.float64).reshape(-1, len(limit))
    values = values[(values < limit).all(axis=1)]
    return _volume(values[on_front(values)], limit)


def _volume(values: Floats, limit: Floats) -> float:
    if not len(values):
        return 0.0
    if len(limit) == 1:
        return float(limit[0] - values.min())
    values = values[np.argsort(values[:, 0])]
    widths = np.diff(np.append(values[:, 0], limit[0]))
    if len(limit) == 2:
        return float(widths @ (limit[1] - np.minimum.accumulate(values[:, 1])))
    return sum(
        float(width) * _volume(values[: row + 1, 1:], limit[1:])
        for row, width in enumerate(widths)
        if width
    )
