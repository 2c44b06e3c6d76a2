"""Coverage at a precision, against trying every threshold."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fathom.training.validate import Drafts, coverage_at_precision

rows = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 1.0]), st.booleans()), max_size=30
)


@given(rows=rows, precision=st.sampled_from([0.5, 0.8, 0.95, 1.0]))
def test_no_threshold_covers_more(rows: list[tuple[float, bool]], precision: float) -> None:
    drafts = Drafts(
        torch.tensor([c for c, _ in rows]),
        torch.tensor([a for _, a in rows], dtype=torch.bool),
        torch.zeros(len(rows), dtype=torch.int64),
    )
    best = 0.0
    for threshold in [-1.0, 0.0, 0.1, 0.3, 0.5, 0.9]:
        kept = [agrees for confidence, agrees in rows if confidence > threshold]
        if kept and sum(kept) >= precision * len(kept) - 1e-9:
            best = max(best, len(kept) / len(rows))
    coverage, threshold = coverage_at_precision(drafts, precision)
    assert abs(coverage - best) < 1e-6
    above = [agrees for confidence, agrees in rows if confidence > threshold]
    if coverage and 0.0 not in [c for c, _ in rows]:
        assert abs(len(above) / len(rows) - coverage) < 1e-6


def test_rows_are_counted_by_domain() -> None:
    drafts = Drafts(
        torch.tensor([0.9, 0.8, 0.7]),
        torch.tensor([True, False, True]),
        torch.tensor([0, 0, 1]),
        ("a", "b"),
    )
    assert drafts.of("a").agreement == 0.5
    assert drafts.of("b").agreement == 1.0
    assert drafts.above(0.75)[0] == torch.tensor(2 / 3)
