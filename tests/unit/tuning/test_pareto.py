from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.tuning.pareto import hypervolume, on_front

# Small whole numbers: many ties, and volumes that can be counted in unit cells.
POINTS = st.integers(1, 3).flatmap(
    lambda d: st.lists(st.lists(st.integers(0, 5), min_size=d, max_size=d), max_size=8).map(
        lambda rows: np.array(rows, float).reshape(-1, d)
    )
)


@given(POINTS)
@settings(deadline=None)
def test_volume_is_the_cells_that_some_point_dominates(points: np.ndarray) -> None:
    limit = 5
    cells = product(range(limit), repeat=points.shape[1])
    covered = sum(any((point <= cell).all() for point in points) for cell in cells)
    assert hypervolume(points, np.full(points.shape[1], limit)) == pytest.approx(covered)


@given(POINTS)
@settings(deadline=None)
def test_the_front_dominates_all_and_nothing_dominates_it(points: np.ndarray) -> None:
    inside = on_front(points)
    front = points[inside]
    for point in points:
        assert any((own <= point).all() for own in front)
    for one, other in product(front, repeat=2):
        assert not ((one <= other).all() and (one < other).any())
    assert len(np.unique(front, axis=0)) == len(front)


def test_known_volumes() -> None:
    assert hypervolume([[1.0, 2.0], [2.0, 1.0]], [3.0, 3.0]) == 3.0
    assert hypervolume([[0.0, 0.0, 0.5]], [1.0, 1.0, 1.0]) == 0.5
    # On or above the reference in one column: nothing.
    assert hypervolume([[0.0, 3.0], [4.0, 0.0]], [3.0, 3.0]) == 0.0
    assert hypervolume(np.empty((0, 2)), [1.0, 1.0]) == 0.0
