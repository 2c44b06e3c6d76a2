"""How many replicas a load asks for: growth, shrinking, and neither in between."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.autoscaling import (
    BUSY,
    CLIENTS,
    QUEUE_S,
    REQUESTS,
    ByQueue,
    ByRequests,
    for_queue,
    for_requests,
)

loads = st.lists(st.floats(0, 200), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("requests", "wanted"),
    [
        ([16.0], 1),
        ([17.0], 1),  # a little above the target is left alone
        ([18.0], 2),
        ([100.0], 7),
        ([20.0, 40.0], 4),
        ([15.0, 15.0], 2),  # would fit into fewer, but only just
        ([6.0, 6.0], 1),
        ([0.0, 0.0, 0.0], 1),
    ],
)
def test_requests_are_shared(requests: list[float], wanted: int) -> None:
    assert for_requests(requests, len(requests), 16) == wanted


@given(loads)
def test_requests_do_not_make_a_pool_swing(requests: list[float]) -> None:
    """With the wanted number of replicas and the same requests, nothing more is wanted."""
    wanted = for_requests(requests, len(requests), 16)
    total = sum(requests)
    assert wanted >= 1
    assert total <= wanted * 16 * 1.1 + 1e-6
    assert for_requests([total / wanted] * wanted, wanted, 16) == wanted


def test_a_replica_that_has_not_spoken_yet_counts_as_the_mean() -> None:
    assert for_requests([32.0], 2, 16) == 4
    assert for_requests([], 3, 16) == 3
    assert for_queue([], [], [], 3, 0.05) == 3


def test_a_pool_grows_while_flushes_wait_but_not_beyond_who_flushes() -> None:
    assert for_queue([0.2], [1.0], [3], 1, 0.05) == 2
    assert for_queue([0.2] * 4, [1.0] * 4, [2] * 4, 4, 0.05) == 6
    assert for_queue([0.2], [1.0], [1], 1, 0.05) == 1
    assert for_queue([0.052], [1.0], [3], 1, 0.05) == 1


def test_a_pool_shrinks_where_the_others_have_room() -> None:
    assert for_queue([0.0, 0.0], [0.1, 0.2], [2, 2], 2, 0.05) == 1
    # Nobody waits, but one alone would be busy all the time.
    assert for_queue([0.0, 0.0], [0.5, 0.5], [2, 2], 2, 0.05) == 2
    assert for_queue([0.03, 0.03], [0.1, 0.1], [2, 2], 2, 0.05) == 2
    assert for_queue([0.0], [0.0], [0], 1, 0.05) == 1


@given(st.integers(1, 20), st.floats(0, 1), st.floats(0, 0.2))
def test_a_smaller_pool_has_room_for_the_work(replicas: int, busy: float, wait: float) -> None:
    wanted = for_queue([wait] * replicas, [busy] * replicas, [2] * replicas, replicas, 0.05)
    assert 1 <= wanted <= 2 * replicas
    if wanted < replicas:
        assert busy * replicas / wanted < 0.8
        assert wait < 0.05
        assert not math.isclose(busy, 1)


def context(current: int, **figures: list[float]) -> SimpleNamespace:
    metrics = {name: dict(enumerate(values)) for name, values in figures.items()}
    return SimpleNamespace(current_num_replicas=current, aggregated_metrics=metrics)


def test_serve_calls_the_policies_with_its_context() -> None:
    assert ByRequests(target=4)(context(1, **{REQUESTS: [12.0]})) == (3, {})
    figures = {QUEUE_S: [0.3], BUSY: [1.0], CLIENTS: [2.0]}
    assert ByQueue(target=0.05)(context(1, **figures)) == (2, {})
    nothing = SimpleNamespace(current_num_replicas=2, aggregated_metrics=None)
    assert ByRequests(target=4)(nothing) == ByQueue(target=1)(nothing) == (2, {})
