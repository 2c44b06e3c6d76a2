"""Exit states keep what the deep stage may need, whatever is added, cut and dropped."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fathom.engine.states import ExitStates

WIDTH = 3
operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 50)),
        st.tuples(st.just("cut"), st.integers(0, 150)),
        st.tuples(st.just("drop"), st.integers(0, 150)),
    ),
    max_size=20,
)


def fresh(position: int, count: int, mark: int) -> torch.Tensor:
    """Rows that tell their position and when they were made."""
    rows = torch.zeros(count, WIDTH)
    rows[:, 0] = torch.arange(position, position + count)
    rows[:, 1] = mark
    return rows


@given(first=st.integers(0, 40), ops=operations)
def test_rows_are_those_that_were_added_last_at_their_position(first, ops) -> None:
    states = ExitStates(first)
    expected: dict[int, torch.Tensor] = {}
    start = stop = first
    for mark, (name, number) in enumerate(ops):
        if name == "append":
            states.append(fresh(stop, number, mark))
            expected.update(enumerate(fresh(stop, number, mark), stop))
            stop += number
        elif name == "cut":
            states.cut(number)
            start, stop = min(start, number), max(min(start, number), min(stop, number))
        else:
            states.drop(number)
            start = max(start, number)
            stop = max(stop, start)
        assert (states.start, states.stop) == (start, stop)
        if start < stop:
            found = states.rows(start, stop)
            assert torch.equal(found, torch.stack([expected[p] for p in range(start, stop)]))


def test_rows_given_out_outlive_a_drop() -> None:
    states = ExitStates()
    states.append(fresh(0, 8, 0))
    away = states.rows(2, 5)
    states.drop(8)
    states.append(fresh(8, 40, 1))
    assert torch.equal(away, fresh(2, 3, 0))


def test_a_fork_is_a_copy() -> None:
    states = ExitStates(2)
    states.append(fresh(2, 6, 0))
    copy = states.fork(5)
    states.cut(3)
    states.append(fresh(3, 5, 1))
    assert torch.equal(copy.rows(2, 5), fresh(2, 3, 0))
    assert states.fork(1).start == states.fork(1).stop == 1
    with pytest.raises(IndexError, match="cannot fork at 9"):
        states.fork(9)


def test_positions_that_are_not_kept_are_refused() -> None:
    states = ExitStates(4)
    states.append(fresh(4, 2, 0))
    with pytest.raises(IndexError, match="rows 3 to 5 of 4 to 6"):
        states.rows(3, 5)
