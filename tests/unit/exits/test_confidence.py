"""Confidence measures: scores in [0, 1], by their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import entropy

from fathom.exits.confidence import entropy_score, max_prob, saturation, softmax_gap

rows_of_logits = st.lists(
    st.lists(st.floats(-30, 30), min_size=5, max_size=5), min_size=1, max_size=4
)


@given(rows_of_logits)
def test_measures_are_their_definitions(rows: list[list[float]]) -> None:
    logits = torch.tensor(rows)
    p = softmax(np.array(rows), axis=1)
    np.testing.assert_allclose(max_prob(logits), p.max(axis=1), rtol=1e-5)
    expected = 1 - entropy(p, axis=1) / math.log(5)
    np.testing.assert_allclose(entropy_score(logits), expected, rtol=1e-4, atol=1e-5)


def test_certain_and_clueless_rows_are_the_ends_of_the_scale() -> None:
    logits = torch.tensor([[60.0, 0, 0, -math.inf], [1.0, 1, 1, 1]])
    assert entropy_score(logits).tolist() == pytest.approx([1, 0], abs=1e-6)
    assert max_prob(logits).tolist() == pytest.approx([1, 0.25])
    assert softmax_gap(logits)[0].tolist() == pytest.approx([1, 0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("measure", [max_prob, entropy_score])
def test_a_row_without_a_finite_total_has_no_confidence(bad: float, measure) -> None:  # type: ignore[no-untyped-def]
    first, second = measure(torch.tensor([[1.0, bad, 0.0], [1.0, 0.0, 0.0]])).tolist()
    assert math.isnan(first)
    assert 0 < second < 1


def test_saturation_is_the_cosine_of_two_states() -> None:
    states = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    earlier = torch.tensor([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    assert saturation(states, earlier).tolist() == pytest.approx([1, 0.5, 0])
    assert saturation(states.bfloat16(), earlier.bfloat16()).dtype is torch.float32
