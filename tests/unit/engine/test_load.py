"""Under load an engine takes cheaper settings, and from nobody who did not allow it."""

from __future__ import annotations

import dataclasses

import pytest

from fathom.engine.engine import Engine
from fathom.exits.load import LoadConfig
from fathom.types import AcceptMode, ComputePolicy, PolicyName
from tests.unit.engine.conftest import Completion, MakeEngine, drain, request

PROMPT = (3, 5, 7, 9)
# Confidences of a random model are small: at 0.2 few tokens leave, at 0.2**8 all do.
FREE = ComputePolicy(mode=AcceptMode.FREE, exit_threshold=0.2)
ALWAYS_SHORT = LoadConfig(enabled=True, waiting=1, rise_s=1e-9, fall_s=1e9, most=3)


def crowd(engine: Engine, compute: ComputePolicy) -> dict[tuple[str, int], Completion]:
    """Four requests, of which one runs at a time: there is always one waiting before the last."""
    for number in range(4):
        engine.add_request(request(str(number), (*PROMPT, number), compute, seed=number))
    return drain(engine)


def shifted(found: dict[tuple[str, int], Completion]) -> list[int]:
    usages = [each.last.usage for _, each in sorted(found.items()) if each.last is not None]
    return [usage.compute.load_shifted for usage in usages if usage is not None]


def exited(found: dict[tuple[str, int], Completion]) -> int:
    return sum(depth < 4 for each in found.values() for depth in each.depths)


@pytest.fixture(scope="module")
def calm_engine(make_engine: MakeEngine) -> Engine:
    return make_engine(max_num_seqs=1)


@pytest.fixture
def engine(make_engine: MakeEngine) -> Engine:
    engine = make_engine(max_num_seqs=1)
    engine.shift_under_load(ALWAYS_SHORT)
    return engine


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mode": AcceptMode.COPY},
        {"mode": AcceptMode.ROLLBACK},
        {"policy": PolicyName.ADAPTIVE},
        {"policy": PolicyName.BUDGET, "budget": 0.95, "exit_threshold": 0.3},
    ],
    ids=["free", "copy", "rollback", "adaptive", "budget"],
)
def test_tokens_leave_earlier_under_load(
    calm_engine: Engine, engine: Engine, fields: dict[str, object]
) -> None:
    compute = dataclasses.replace(FREE, **fields)  # type: ignore[arg-type]
    calm = crowd(calm_engine, compute)
    busy = crowd(engine, compute)
    assert shifted(calm) == [0] * 4
    assert sum(shifted(busy)) > 40
    assert all(count <= 24 for count in shifted(busy))
    assert exited(busy) >= exited(calm)
    if compute.policy is PolicyName.THRESHOLD and compute.mode is not AcceptMode.ROLLBACK:
        assert exited(busy) > exited(calm) + 20
    assert engine.ledger.total.load_shifted == sum(shifted(busy))
    assert engine.stats()["load_shifted_tokens"] == sum(shifted(busy))
    assert engine.stats()["load_level"] == 3


@pytest.mark.parametrize(
    "compute",
    [
        ComputePolicy(mode=AcceptMode.EXACT, exit_threshold=0.1),
        ComputePolicy(mode=AcceptMode.FULL),
        dataclasses.replace(FREE, load_aware=False),
        dataclasses.replace(FREE, policy=PolicyName.RISK, risk=0.05),
        dataclasses.replace(FREE, policy=PolicyName.FORCED, forced_exit_rate=0.3),
    ],
    ids=["exact", "full", "unaware", "risk", "forced"],
)
def test_who_does_not_allow_it_gets_what_it_asked_for(
    calm_engine: Engine, engine: Engine, compute: ComputePolicy
) -> None:
    calm = crowd(calm_engine, compute)
    busy = crowd(engine, compute)
    assert engine.stats()["load_level"] == 3
    assert shifted(busy) == [0] * 4
    for name, each in calm.items():
        assert (busy[name].ids, busy[name].depths) == (each.ids, each.depths)


def test_off_unless_enabled(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1)
    engine.shift_under_load(dataclasses.replace(ALWAYS_SHORT, enabled=False))
    assert shifted(crowd(engine, FREE)) == [0] * 4
    assert engine.stats()["load_level"] == 0


def test_a_point_is_taken_before_a_step(make_engine: MakeEngine) -> None:
    """The next point lets everybody leave, a step from 0.99 hardly anybody."""
    asked = dataclasses.replace(FREE, exit_threshold=0.99)
    cheaper = dataclasses.replace(FREE, exit_threshold=0.0)
    found = []
    for points in ((), ((asked, 0.9), (cheaper, 0.4))):
        engine = make_engine(max_num_seqs=1)
        engine.shift_under_load(dataclasses.replace(ALWAYS_SHORT, most=1), points)
        found.append(exited(crowd(engine, asked)))
    assert found[0] == 0
    assert found[1] > 40


def test_what_load_spared_is_not_made_up_for(engine: Engine) -> None:
    budget = dataclasses.replace(FREE, policy=PolicyName.BUDGET, budget=0.9, exit_threshold=0.05)
    for _ in range(3):
        crowd(engine, budget)
    tracker = next(iter(engine.policies._observed.values()))._tracker
    assert budget.budget not in tracker._owed
