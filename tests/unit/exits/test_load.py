"""Cheaper settings under load: hysteresis, and what is cheaper."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.compute import AcceptMode, ComputePolicy, PolicyName
from fathom.exits.load import (
    Ladder,
    LoadConfig,
    LoadLevel,
    LoadShift,
    Pressure,
    may_shift,
)
from fathom.settings import ConfigError

CONFIG = LoadConfig(enabled=True, rise_s=1.0, fall_s=5.0, most=3)
HIGH, BETWEEN, LOW = Pressure(waiting=4), Pressure(waiting=3), Pressure(waiting=2)
FREE = ComputePolicy(mode=AcceptMode.FREE, exit_threshold=0.9)
pressures = st.sampled_from([HIGH, BETWEEN, LOW, Pressure(), Pressure(queue_s=2, kv_usage=0.1)])
history = st.lists(st.tuples(pressures, st.floats(0.01, 8)), max_size=60)
shares = st.floats(0.0, 1.0)
computes = st.builds(
    ComputePolicy,
    mode=st.sampled_from(AcceptMode),
    policy=st.sampled_from(PolicyName),
    exit_threshold=st.none() | shares,
    budget=st.floats(0.05, 1.0),
    risk=st.floats(0.01, 0.5),
    load_aware=st.booleans(),
)


@given(history)
def test_the_level_follows_the_pressure_slowly(steps: list[tuple[Pressure, float]]) -> None:
    level, now, before = LoadLevel(CONFIG), 0.0, 0
    high_since = low_since = None
    rises = falls = 0
    for pressure, pause in steps:
        now += pause
        after = level.update(pressure, now)
        assert 0 <= after <= CONFIG.most
        if pressure not in (HIGH, Pressure(queue_s=2, kv_usage=0.1)):
            high_since, rises = None, 0
        elif high_since is None:
            high_since = now
        if pressure not in (LOW, Pressure()):
            low_since, falls = None, 0
        elif low_since is None:
            low_since = now
        if after > before:
            assert high_since is not None
            assert after == before + 1
            rises += 1
            assert now - high_since >= rises * CONFIG.rise_s - 1e-6
        if after < before:
            assert low_since is not None
            falls += before - after
            assert now - low_since >= falls * CONFIG.fall_s - 1e-6
        before = after


@given(history, st.lists(st.floats(0.01, 8), min_size=1, max_size=40))
def test_between_the_thresholds_nothing_changes(
    steps: list[tuple[Pressure, float]], pauses: list[float]
) -> None:
    level, now = LoadLevel(CONFIG), 0.0
    for pressure, pause in steps:
        now += pause
        level.update(pressure, now)
    before = level.level
    for pause in pauses:
        now += pause
        assert level.update(BETWEEN, now) == before


@given(history)
def test_lasting_pressure_takes_it_to_the_top_and_lasting_calm_back(
    steps: list[tuple[Pressure, float]],
) -> None:
    level, now = LoadLevel(CONFIG), 0.0
    for pressure, pause in steps:
        now += pause
        level.update(pressure, now)
    for _ in range(CONFIG.most + 2):
        now += CONFIG.rise_s + 0.01
        level.update(HIGH, now)
    assert level.level == CONFIG.most
    level.update(Pressure(), now)
    # Nobody may have looked for a while: an engine with nothing to do takes no steps.
    assert level.update(Pressure(), now + CONFIG.most * CONFIG.fall_s + 0.01) == 0


def test_a_moment_of_pressure_changes_nothing() -> None:
    level = LoadLevel(CONFIG)
    for now in range(0, 20, 2):
        level.update(HIGH, float(now))
        assert level.update(LOW, now + 0.9) == 0


@pytest.mark.parametrize(
    "pressure", [Pressure(waiting=4), Pressure(queue_s=1.0), Pressure(kv_usage=0.95)]
)
def test_any_shortage_is_pressure(pressure: Pressure) -> None:
    level = LoadLevel(CONFIG)
    level.update(pressure, 0.0)
    assert level.update(pressure, 1.0) == 1


@given(computes, st.integers(0, 6))
def test_only_what_may_be_lowered_is_and_nothing_else_changes(
    compute: ComputePolicy, steps: int
) -> None:
    rung = Ladder(least_budget=lambda _: 0.3).down(compute, steps)
    kept = dataclasses.replace(
        rung.compute, exit_threshold=compute.exit_threshold, budget=compute.budget
    )
    assert kept == compute
    assert rung.steps <= steps
    if compute.mode in (AcceptMode.EXACT, AcceptMode.FULL) or not compute.load_aware:
        assert rung.compute == compute
        assert rung.steps == 0
    if compute.policy not in (PolicyName.THRESHOLD, PolicyName.ADAPTIVE, PolicyName.BUDGET):
        assert rung.compute == compute
    if rung.steps:
        assert may_shift(compute)
        rung.compute.validate()


@given(shares, st.integers(1, 5))
def test_thresholds_fall_with_each_step(threshold: float, steps: int) -> None:
    compute = dataclasses.replace(FREE, exit_threshold=threshold)
    ladder = Ladder()
    path = [ladder.down(compute, n).compute.threshold for n in range(steps + 1)]
    assert path == sorted(path, reverse=True)
    assert all(0 <= each <= 1 for each in path)
    adaptive = ladder.down(dataclasses.replace(compute, policy=PolicyName.ADAPTIVE), steps)
    lowered = adaptive.lower(threshold)
    assert lowered == pytest.approx(path[-1], abs=1e-12)
    assert adaptive.lower(None) is None


@given(st.floats(0.05, 1.0), st.floats(0.05, 1.0), st.integers(1, 12))
def test_budgets_fall_to_the_least_possible(budget: float, least: float, steps: int) -> None:
    compute = ComputePolicy(mode=AcceptMode.FREE, policy=PolicyName.BUDGET, budget=budget)
    rung = Ladder(least_budget=lambda _: least).down(compute, steps)
    assert rung.compute.budget is not None
    assert min(budget, least) <= rung.compute.budget <= budget
    assert rung.compute.budget == pytest.approx(max(min(budget, least), budget - 0.1 * steps))


def test_the_next_point_is_the_dearest_of_the_cheaper_ones_in_its_family() -> None:
    def point(threshold: float, **fields: object) -> ComputePolicy:
        return dataclasses.replace(FREE, exit_threshold=threshold, **fields)  # type: ignore[arg-type]

    budget = dataclasses.replace(
        FREE, policy=PolicyName.BUDGET, budget=0.5, exit_threshold=0.4, operating_point="fast"
    )
    ladder = Ladder(
        [
            (point(0.6), 0.7),
            (point(0.9), 0.9),
            (budget, 0.5),
            (point(0.8, mode=AcceptMode.ROLLBACK), 0.85),
            (point(0.8, max_stack=3), 0.84),
            (point(0.8, policy=PolicyName.RISK, risk=0.05), 0.83),
            (point(0.8, exit_temperature=1.5), 0.82),
        ]
    )
    asked = point(0.9, operating_point="own", probe_rate=0.1)
    first, second, third = (ladder.down(asked, n).compute for n in (1, 2, 3))
    assert first == dataclasses.replace(asked, exit_threshold=0.6)
    assert (second.policy, second.budget, second.exit_threshold) == (PolicyName.BUDGET, 0.5, 0.4)
    assert (second.operating_point, second.probe_rate) == ("own", 0.1)
    assert third.budget == pytest.approx(0.4)
    # What is no point has no measured cost: it goes by steps.
    assert ladder.down(point(0.95), 1).compute.exit_threshold == pytest.approx(0.95**2)


def test_other_points_are_for_requests_that_have_not_asked_for_the_old_ones() -> None:
    """Who runs at a point goes down by the ladder that has it, to the end of its request."""
    now = [0.0]
    old = [(at(0.8), 0.9), (at(0.5), 0.7)]
    new = [(at(0.9), 0.95), (at(0.6), 0.8)]
    shift = LoadShift(CONFIG, Ladder(old), clock=lambda: now[0])
    for _ in range(2):
        shift.update(HIGH)
        now[0] += CONFIG.rise_s
    assert shift.level == 1

    def lowered(compute: ComputePolicy) -> float | None:
        rung = shift.rung(compute)
        assert rung is not None
        return rung.compute.exit_threshold

    before = [lowered(at(0.8)), lowered(at(0.9))]
    assert before == [0.5, pytest.approx(0.81)]  # no point: a step
    shift.take(Ladder(new))
    assert shift.level == 1
    assert [lowered(at(0.8)), lowered(at(0.9))] == [0.5, 0.6]
    shift.take(Ladder([]))
    assert [lowered(at(0.8)), lowered(at(0.9))] == [pytest.approx(0.64), 0.6]


def at(threshold: float) -> ComputePolicy:
    return dataclasses.replace(FREE, exit_threshold=threshold)


def test_a_shift_goes_by_its_clock() -> None:
    now = [0.0]
    shift = LoadShift(CONFIG, clock=lambda: now[0])
    assert shift.rung(FREE) is None
    for level in (0, 1, 2):
        shift.update(HIGH)
        assert shift.level == level
        now[0] += 1
    rung = shift.rung(FREE)
    assert rung is not None
    assert rung.compute.exit_threshold == pytest.approx(0.9**4)
    assert shift.rung(FREE) is rung
    assert shift.rung(dataclasses.replace(FREE, load_aware=False)) is None
    shift.update(Pressure())
    now[0] += 10
    shift.update(Pressure())
    assert shift.rung(FREE) is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"enabled": 1}, "enabled must be true or false, got 1"),
        ({"waiting": 0}, "waiting must be an integer of at least 1, got 0"),
        ({"most": True}, "most must be an integer"),
        ({"kv_usage": 1.5}, "kv_usage must be at most 1, got 1.5"),
        ({"relax": 1}, "relax must be below 1"),
        ({"fall_s": 0}, "fall_s must be above 0, got 0"),
    ],
)
def test_wrong_settings_are_named(fields: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LoadConfig(**fields).validate()  # type: ignore[arg-type]
