"""Figures of held-out rows, by domain."""

from __future__ import annotations

import pytest
import torch

from fathom.training.validate import Drafts, figures


def test_rows_are_counted_by_domain() -> None:
    drafts = Drafts(
        torch.tensor([0.9, 0.8, 0.7]),
        torch.tensor([True, False, True]),
        torch.tensor([0, 0, 1]),
        ("a", "b"),
    )
    assert drafts.of("a").agreement == 0.5
    assert drafts.of("b").agreement == 1.0
    assert drafts.above(0.75) == (pytest.approx(2 / 3), 0.5)
    found = figures(drafts)
    assert found["heldout_agreement"] == pytest.approx(2 / 3)
    assert found["heldout_a_coverage_at_precision_95"] == 0.5
    assert found["heldout_b_coverage_at_precision_95"] == 1.0
