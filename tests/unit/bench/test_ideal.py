from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.bench.ideal import (
    exit_probability,
    ideal_speedup,
    in_step_speedup,
    tokens_per_flush,
)


@dataclass
class LinearCosts:
    """Each stage costs a fixed part and a part for each row."""

    shallow_s: float = 1.0
    head_s: float = 0.0
    deep_s: float = 3.0
    row_s: float = 0.0

    def shallow(self, rows: float) -> float:
        return self.shallow_s + self.head_s + self.row_s * rows

    def shallow_full(self, rows: float) -> float:
        return self.shallow_s + self.row_s * rows

    def deep(self, rows: float) -> float:
        return self.deep_s + self.row_s * rows


costs = st.builds(
    LinearCosts,
    shallow_s=st.floats(0.1, 10),
    head_s=st.floats(0, 10),
    deep_s=st.floats(0.1, 10),
    row_s=st.floats(0, 10),
)


@pytest.mark.parametrize(
    ("exit_rate", "expected"), [(0.0, 1.0), (0.5, 2.0), (0.75, 4.0), (0.99, 9.0), (1.0, 9.0)]
)
def test_tokens_per_flush(exit_rate: float, expected: float) -> None:
    assert tokens_per_flush(exit_rate, max_stack=8) == pytest.approx(expected)


def test_free_rows_give_the_papers_formula() -> None:
    # s = 1/4, r = 1, k = 4: 1 / (1/4 + 3/4 / 4)
    ideal = in_step_speedup(LinearCosts(), batch=1, exit_rate=0.75, max_stack=8)
    assert ideal == pytest.approx(1 / (0.25 + 0.75 / 4))


def test_rows_that_cost_in_full_gain_nothing_in_the_deep_stage() -> None:
    # deep(Bk) = k deep(B): every token pays for its deep layers, whenever they run.
    linear = LinearCosts(shallow_s=0, deep_s=0, row_s=1.0)
    assert in_step_speedup(linear, batch=3, exit_rate=0.75, max_stack=8) == pytest.approx(1.0)


@given(costs, st.integers(1, 64))
def test_without_exits_only_the_exit_head_is_lost(measured: LinearCosts, batch: int) -> None:
    full = measured.shallow_full(batch) + measured.deep(batch)
    ideal = in_step_speedup(measured, batch=batch, exit_rate=0.0, max_stack=8)
    assert ideal == pytest.approx(full / (full + measured.head_s))


@given(costs, st.integers(1, 64), st.floats(0, 1), st.integers(1, 64))
def test_it_equals_the_time_of_a_round_over_that_of_full_steps(
    measured: LinearCosts, batch: int, exit_rate: float, max_stack: int
) -> None:
    k = tokens_per_flush(exit_rate, max_stack)
    full = k * (measured.shallow_full(batch) + measured.deep(batch))
    drafted = k * measured.shallow(batch) + measured.deep(batch * k)
    ideal = in_step_speedup(measured, batch=batch, exit_rate=exit_rate, max_stack=max_stack)
    assert math.isfinite(ideal)
    assert ideal == pytest.approx(full / drafted)


@given(costs, st.floats(0, 1), st.floats(0, 1))
def test_more_exits_never_make_it_slower(measured: LinearCosts, a: float, b: float) -> None:
    low, high = sorted((a, b))
    slower, faster = (
        in_step_speedup(measured, batch=4, exit_rate=rate, max_stack=8) for rate in (low, high)
    )
    assert slower <= faster * (1 + 1e-9)


@given(costs, st.floats(0, 1), st.integers(1, 12))
def test_the_ideal_of_one_sequence_is_the_formula(
    measured: LinearCosts, exit_rate: float, max_stack: int
) -> None:
    case = {"batch": 1, "exit_rate": exit_rate, "max_stack": max_stack}
    assert ideal_speedup(measured, **case) == in_step_speedup(measured, **case)


@settings(max_examples=15, deadline=None)
@given(costs, st.integers(2, 6), st.floats(0, 0.9))
def test_several_sequences_never_beat_stopping_in_step(
    measured: LinearCosts, batch: int, exit_rate: float
) -> None:
    case = {"batch": batch, "exit_rate": exit_rate, "max_stack": 8}
    ideal = ideal_speedup(measured, **case, rounds=600)
    assert ideal <= in_step_speedup(measured, **case) * 1.05


def test_sequences_that_never_exit_stop_in_step() -> None:
    case = {"batch": 4, "exit_rate": 0.0, "max_stack": 8}
    assert ideal_speedup(LinearCosts(), **case) == pytest.approx(
        in_step_speedup(LinearCosts(), **case)
    )


@given(st.floats(0, 0.88), st.integers(1, 8))
def test_the_exit_probability_gives_the_exit_rate(exit_rate: float, cap: int) -> None:
    p = exit_probability(exit_rate, cap)
    k = sum(p**i for i in range(cap + 1))
    assert k == pytest.approx(tokens_per_flush(exit_rate, cap), rel=1e-6)
