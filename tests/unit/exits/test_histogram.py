"""Decayed counts of confidences, against counting by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.exits.histogram import ConfidenceHistogram, Kind

rows_seen = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from([None, True, False]), st.floats(0, 50)), max_size=40
)
half_lives = st.sampled_from([None, 0.5, 3.0, 200.0])


def filled(rows: list[tuple[float, bool | None, float]], **settings) -> ConfidenceHistogram:  # type: ignore[no-untyped-def]
    histogram = ConfidenceHistogram(**settings)
    for confidence, agrees, weight in rows:
        histogram.add_one(confidence, agrees, weight)
    return histogram


@given(rows_seen, half_lives)
def test_every_row_is_in_the_bin_that_holds_it_and_halves_in_a_half_life(rows, half_life) -> None:
    histogram = filled(rows, bins=8, half_life=half_life)
    expected = np.zeros((3, 8))
    for age, (confidence, agrees, weight) in enumerate(reversed(rows)):
        kind = Kind.UNLABELLED if agrees is None else Kind.AGREES if agrees else Kind.DISAGREES
        place = int(np.searchsorted(histogram.edges[1:-1], confidence, side="right"))
        expected[kind, place] += weight * (1 if half_life is None else 0.5 ** (age / half_life))
    # A confidence on an edge may be rounded to either side.
    if not any(np.isclose(histogram.edges, c, atol=1e-9).any() for c, _, _ in rows):
        np.testing.assert_allclose(histogram.counts, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(histogram.totals, expected.sum(axis=1), rtol=1e-9, atol=1e-12)


@given(rows_seen, half_lives)
def test_rows_at_once_count_like_rows_one_by_one(rows, half_life) -> None:
    rows = [(c, agrees is True, w) for c, agrees, w in rows]
    one_by_one = filled(rows, half_life=half_life)
    at_once = ConfidenceHistogram(half_life=half_life)
    half = len(rows) // 2
    for part in (rows[:half], rows[half:]):
        if part:
            at_once.add(*(list(column) for column in zip(*part, strict=True)))
    np.testing.assert_allclose(at_once.counts, one_by_one.counts, rtol=1e-9, atol=1e-12)
    assert at_once.seen == one_by_one.seen == len(rows)


def test_what_is_not_a_number_is_left_out_and_the_rest_is_clipped() -> None:
    histogram = ConfidenceHistogram(bins=4)
    for confidence in (math.nan, -0.5, math.inf):
        histogram.add_one(confidence, True)
    histogram.add([math.nan, 2.0], [True, True])
    assert histogram.seen == 3
    assert histogram.counts[Kind.AGREES].tolist() == [1, 0, 0, 2]


def test_a_long_life_does_not_overflow() -> None:
    histogram = ConfidenceHistogram(half_life=2)
    for _ in range(5000):
        histogram.add_one(0.5, None)
    # The sum of 2^(-age / 2) over all ages.
    assert histogram.totals[Kind.UNLABELLED] == pytest.approx(1 / (1 - 2**-0.5))
    histogram.add(np.full(100_000, 0.5))
    assert histogram.totals[Kind.UNLABELLED] == pytest.approx(1 / (1 - 2**-0.5))


@given(rows_seen, rows_seen, half_lives)
def test_two_that_are_added_have_seen_both(first, second, half_life) -> None:
    both = filled(first, half_life=half_life) + filled(second, half_life=half_life)
    apart = filled(first, half_life=half_life).counts + filled(second, half_life=half_life).counts
    np.testing.assert_allclose(both.counts, apart)
    assert both.seen == len(first) + len(second)


@given(rows_seen, half_lives)
def test_it_goes_through_json_and_counts_on(rows, half_life) -> None:
    histogram = filled(rows, half_life=half_life)
    copied = ConfidenceHistogram.from_dict(json.loads(json.dumps(histogram.to_dict())))
    for each in (histogram, copied):
        each.add_one(0.3, False)
    np.testing.assert_allclose(copied.counts, histogram.counts, rtol=1e-9, atol=1e-12)
    assert (copied.seen, copied.half_life) == (histogram.seen, histogram.half_life)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.floats(0, 1))
def test_a_quantile_has_its_share_below_it(confidences, share) -> None:
    histogram = ConfidenceHistogram()
    histogram.add(confidences)
    value = float(histogram.quantile(share))
    assert histogram.share_above(value) == pytest.approx(1 - share, abs=1e-6)
    # Rows are right up to the bin that the quantile lies in.
    edge = int(np.clip(np.searchsorted(histogram.edges, value), 1, histogram.bins))
    low, high = histogram.edges[edge - 1] - 1e-9, histogram.edges[edge] + 1e-9
    assert np.mean(np.array(confidences) < low) <= share + 1e-6
    assert np.mean(np.array(confidences) <= high) >= share - 1e-6


def test_bins_are_narrow_where_sure_tokens_are() -> None:
    histogram = ConfidenceHistogram()
    c = 1 - 10 ** np.random.default_rng(0).uniform(-4, -1, 20_000)
    histogram.add(c)
    wanted = np.array([0.05, 0.3, 0.5, 0.7, 0.85])
    np.testing.assert_allclose(
        1 - histogram.quantile(wanted), 1 - np.quantile(c, wanted), rtol=0.06
    )


def test_nothing_seen_has_no_quantile() -> None:
    assert np.isnan(ConfidenceHistogram().quantile([0.1, 0.9])).all()
    assert math.isnan(ConfidenceHistogram().share_above(0.5))


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ({}, "bins"),
        ({"bins": 4, "half_life": None, "seen": 0, "counts": [[0] * 4] * 2}, "counts"),
        ({"bins": 1, "half_life": None, "seen": 0, "counts": [[0]] * 3}, "bins"),
        ({"bins": 4, "half_life": None, "seen": 0, "counts": [[-1] * 4] * 3}, "counts"),
        ({"bins": 4, "half_life": 0, "seen": 0, "counts": [[0] * 4] * 3}, "half_life"),
        ({"bins": 4, "half_life": "x", "seen": 0, "counts": [[0] * 4] * 3}, "histogram"),
        ({"bins": 4, "half_life": None, "seen": 0, "counts": [[0, 1], [2], []]}, "counts"),
    ],
)
def test_a_damaged_histogram_is_refused(body, names) -> None:
    with pytest.raises(ValueError, match=names):
        ConfidenceHistogram.from_dict(body)


def test_bins_must_match() -> None:
    with pytest.raises(ValueError, match="bins"):
        ConfidenceHistogram(4) + ConfidenceHistogram(8)
