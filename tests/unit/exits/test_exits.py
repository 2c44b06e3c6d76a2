"""Confidence and exit policies."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fathom.exits.confidence import softmax_gap
from fathom.exits.policy import exits
from fathom.types import AcceptMode, ComputePolicy, PolicyName


@given(st.lists(st.lists(st.floats(-30, 30), min_size=5, max_size=5), min_size=1, max_size=4))
def test_the_gap_is_the_difference_of_the_two_best_probabilities(rows):
    logits = torch.tensor(rows)
    gap, index = softmax_gap(logits)
    top = torch.softmax(logits.double(), dim=-1).topk(2).values
    torch.testing.assert_close(gap.double(), top[:, 0] - top[:, 1], rtol=1e-4, atol=1e-5)
    assert torch.equal(logits.gather(1, index[:, None])[:, 0], logits.amax(dim=1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_logits_give_no_confidence_and_never_exit(bad):
    gap, _ = softmax_gap(torch.tensor([[1.0, bad, 0.0]]))
    assert not math.isfinite(float(gap))
    for policy in PolicyName:
        compute = ComputePolicy(
            mode=AcceptMode.FREE, policy=policy, exit_threshold=0.0, forced_exit_rate=1.0
        )
        assert not exits(compute, float(gap))


def test_the_threshold_is_strict():
    compute = ComputePolicy(mode=AcceptMode.FREE, exit_threshold=0.5)
    assert not exits(compute, 0.5)
    assert exits(compute, 0.500001)


def test_full_depth_never_exits_and_always_always_does():
    always = ComputePolicy(mode=AcceptMode.FREE, policy=PolicyName.ALWAYS)
    assert exits(always, 0.0)
    full = ComputePolicy(mode=AcceptMode.FULL, policy=PolicyName.ALWAYS)
    assert not exits(full, 1.0)


def test_forced_exits_at_its_rate():
    forced = ComputePolicy(mode=AcceptMode.FREE, policy=PolicyName.FORCED, forced_exit_rate=0.25)
    assert exits(forced, 0.0, uniform=0.2499)
    assert not exits(forced, 0.9, uniform=0.25)
