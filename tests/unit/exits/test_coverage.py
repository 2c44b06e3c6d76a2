"""Coverage at a precision, against trying every threshold."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fathom.exits.coverage import coverage_at_precision

confidences = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 1.0])


@given(
    rows=st.lists(st.tuples(confidences, st.booleans()), max_size=30),
    precision=st.sampled_from([0.5, 0.8, 0.95, 1.0]),
)
def test_no_threshold_covers_more(rows: list[tuple[float, bool]], precision: float) -> None:
    best = 0.0
    for threshold in [-1.0, 0.0, 0.1, 0.3, 0.5, 0.9]:
        kept = [agrees for confidence, agrees in rows if confidence > threshold]
        if kept and sum(kept) >= precision * len(kept) - 1e-9:
            best = max(best, len(kept) / len(rows))
    confidence = torch.tensor([each for each, _ in rows])
    agrees = torch.tensor([each for _, each in rows], dtype=torch.bool)
    coverage, threshold = coverage_at_precision(confidence, agrees, precision)
    assert abs(coverage - best) < 1e-6
    if coverage and 0.0 not in [each for each, _ in rows]:
        assert abs(float((confidence > threshold).float().mean()) - coverage) < 1e-6
