"""Replays of the policies over made-up traces, whose answers are known."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from fathom.engine.costs import CostCurve, StageCosts
from fathom.engine.drafting import DraftRule
from fathom.exits.bias import Method, View
from fathom.exits.live import LivePolicies, most_exits
from fathom.exits.p_values import Bound
from fathom.exits.risk import losses
from fathom.tuning.adaptive_replay import STEP, mixed, probing, replicas, switch
from fathom.tuning.budget_replay import MAX_STACK, live_exits, outcome, spend, targets
from fathom.tuning.policies_bench import bench
from fathom.tuning.replay import Prediction, replay, replay_trace
from fathom.tuning.risk_replay import check_elsewhere, check_splits
from fathom.tuning.rows import Measure, TraceRows, read_rows
from fathom.types import AcceptMode, ComputePolicy
from tests.traces import write_trace

COSTS = StageCosts(
    shallow=CostCurve(((1, 1.0),)),
    shallow_full=CostCurve(((1, 1.0),)),
    deep=CostCurve(((1, 3.0), (9, 3.0))),
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> TraceRows:
    path = tmp_path_factory.mktemp("trace") / "t.parquet"
    write_trace(path, requests=160, tokens=30, scale=4)
    return read_rows(path)


@pytest.fixture(scope="module")
def harder(tmp_path_factory: pytest.TempPathFactory) -> TraceRows:
    """Overconfident: the exit is as sure, and more often wrong."""
    path = tmp_path_factory.mktemp("trace") / "h.parquet"
    write_trace(path, requests=160, tokens=30, scale=4, temperature=4.0, seed=9)
    return read_rows(path)


def test_decoding_is_replayed_row_by_row() -> None:
    confidence = [0.9, 0.9, 0.1, 0.9, 0.9, 0.1]
    agrees = [True, False, True, True, True, True]
    values = (confidence, agrees, agrees, [3, 6], COSTS)
    free = replay(*values, AcceptMode.FREE, 0.5, cap=8)
    # Two sequences of three rows, a flush each: 2 * (3 * 1 + 3) seconds beside 6 * 4.
    assert (free.speedup, free.wrong, free.exits) == (2.0, 1 / 6, 4 / 6)
    exact = replay(*values, AcceptMode.EXACT, 0.5, cap=8)
    # A sequence's first token comes from the deep stage. The wrong draft costs what was drafted
    # behind it: its row is decided, the third comes again.
    assert exact.wrong == 0
    assert exact.exits == 1 / 6
    assert exact.speedup == pytest.approx(24 / ((4 + 5 + 4) + (4 + 5)))
    # The row behind a full stack is decided in its flush, however sure the exit would be.
    capped = replay(*values, AcceptMode.FREE, 0.5, cap=1)
    assert capped.exits == 2 / 6
    assert capped.speedup == pytest.approx(24 / (2 * (2 + 3) + 2 * (1 + 3)))


def test_exact_stops_drafting_where_it_does_not_pay() -> None:
    # The exit head makes a shallow pass dearer.
    costs = dataclasses.replace(COSTS, shallow=CostCurve(((1, 1.3),)))

    def run(agrees: list[bool], *, pauses: bool) -> Prediction:
        return replay(
            [0.9] * 400, agrees, agrees, [200, 400], costs, AcceptMode.EXACT, 0.5, cap=8,
            rule=DraftRule(costs) if pauses else None,
        )  # fmt: skip

    wrong = [False] * 400
    # Nine rows and a flush for one token; after 64 decisions it goes to full depth.
    assert run(wrong, pauses=False).speedup < 0.3
    assert 0.7 < run(wrong, pauses=True).speedup < 1
    right = [True] * 400
    assert run(right, pauses=True) == run(right, pauses=False)
    assert run(right, pauses=True).speedup > 1


def test_a_trace_is_replayed_in_the_order_of_its_sequences(rows: TraceRows) -> None:
    shuffled = rows.select(np.random.default_rng(0).permutation(len(rows)))
    for mode in (AcceptMode.EXACT, AcceptMode.FREE):
        one, other = (replay_trace(each, each.gap, mode, 0.6, cap=8) for each in (rows, shuffled))
        assert one == other


def test_budgets_are_kept_on_held_out_requests(rows: TraceRows) -> None:
    calibration, held_out = rows.halves(1)
    asked = targets(rows.source.exit_cost)
    assert len(asked) == 8
    for target in asked:
        found = spend(calibration, held_out, Measure(), target, seed=1)
        assert found["live"].realised == pytest.approx(target, rel=0.02)
        for name in ("static", "global", "msdnet", "random"):
            assert found[name].realised == pytest.approx(target, abs=0.05), name
        # Confidence is worth something, except where nearly everybody or nobody leaves.
        for name in ("live", "global"):
            assert found[name].quality > found["random"].quality - 0.002
        assert found["static"].quality == pytest.approx(found["random"].quality, abs=0.04)


def test_no_stack_grows_beyond_its_cap(rows: TraceRows) -> None:
    smallest = 1 - most_exits(ComputePolicy(max_stack=MAX_STACK)) * (1 - rows.source.exit_cost)
    exits = live_exits(rows, Measure(), smallest + 1e-6)
    for group in range(rows.num_requests):
        own = exits[rows.groups == group].astype(int)
        assert "1" * (MAX_STACK + 1) not in "".join(map(str, own))
    assert exits.mean() > 0.8
    assert outcome(rows, exits).realised == pytest.approx(1 - exits.mean() * 0.75)


def test_budgets_follow_a_shift_that_fixed_thresholds_do_not(rows: TraceRows) -> None:
    surer = dataclasses.replace(rows, gap=rows.gap**0.25)
    target = 0.6
    live = outcome(surer, live_exits(surer, Measure(), target, first=0.9))
    fixed = outcome(surer, surer.gap > np.quantile(rows.gap, 1 - (1 - target) / 0.75))
    assert abs(live.realised - target) < 0.02 * target < abs(fixed.realised - target)


@pytest.mark.parametrize("bound", list(Bound))
def test_promises_are_seldom_broken(rows: TraceRows, bound: Bound) -> None:
    table = losses(rows.gap, rows.agrees, rows.groups)
    found = check_splits(table, 0.1, 0.1, bound=bound, splits=60)
    assert found.violations <= 6
    assert found.refused == 0
    assert 0 < found.coverage < found.oracle_coverage < 1
    assert found.risk <= 0.1
    tiny = check_splits(table, 0.001, 0.1, bound=bound, splits=5)
    assert tiny.violations == 0 and tiny.coverage == 0


def test_a_broken_promise_is_counted(rows: TraceRows) -> None:
    """The check would find it: what is certified at 40% is far above 5%."""
    table = losses(rows.gap, rows.agrees, rows.groups)
    loose = check_splits(table, 0.4, 0.1, splits=10)
    assert loose.risk > 0.05
    sly = dataclasses.replace(table, wrong=table.wrong // 8)
    half = len(table.rows) // 2
    mixed_up = dataclasses.replace(
        table,
        wrong=np.concatenate([sly.wrong[:half], table.wrong[half:]]),
    )
    # With halves that are not exchangeable no promise holds; splits at random make them so.
    assert check_splits(mixed_up, 0.1, 0.1, splits=20).violations <= 4


def test_a_promise_made_elsewhere_is_contradicted(rows: TraceRows, harder: TraceRows) -> None:
    table = losses(rows.gap, rows.agrees, rows.groups)
    found = check_elsewhere(table, harder, Measure(), 0.1, 0.1)
    assert found is not None and found.risk > 0.1
    assert found.alarm_after is not None and found.alarm_after < found.requests
    at_home = check_elsewhere(table, rows, Measure(), 0.1, 0.1)
    assert at_home is not None and at_home.alarm_after is None


def test_thresholds_follow_a_switch(rows: TraceRows, harder: TraceRows) -> None:
    found = switch(rows, harder, Measure(), Method.EM, switches=3, rows=1500)
    assert found.fine.oracle_after > found.fine.oracle_before + 2 * STEP
    assert found.fine.after == pytest.approx(found.fine.oracle_after, abs=2 * STEP)
    assert found.fine.before == pytest.approx(found.fine.oracle_before, abs=2 * STEP)
    assert found.fine.settled_after is not None and 0 < found.fine.settled_after < 1500
    still = switch(rows, rows, Measure(), Method.EM, switches=2, rows=1000)
    assert still.grid.settled_after is not None and still.grid.settled_after <= 200


def test_probes_tell_of_what_left(harder: TraceRows) -> None:
    everything = probing(harder, Measure(), View.ALL, Method.MOMENTS)
    weighted = probing(harder, Measure(), View.WEIGHTED, Method.MOMENTS)
    blind = probing(harder, Measure(), View.STAYED, Method.MOMENTS)
    assert everything.labelled == 1 > weighted.labelled > blind.labelled
    assert everything.error <= weighted.error <= blind.error + STEP
    assert (weighted.probe_rate, blind.probe_rate) == (0.02, 0.0)


def test_replicas_agree_once_they_share(rows: TraceRows, harder: TraceRows) -> None:
    traffic = mixed(rows, harder, Measure())
    assert traffic.second[:200].mean() == pytest.approx(0.5, abs=0.05)
    assert len(np.unique(traffic.groups)) == rows.num_requests + harder.num_requests
    found = replicas(
        Measure(), traffic.confidence, traffic.agrees, traffic.second,
        halves="by workload", half_life=150,
    )  # fmt: skip
    assert found.merged < found.alone
    assert found.merged_within > found.alone_within


def test_the_report_has_its_shape(rows: TraceRows, harder: TraceRows) -> None:
    report = bench(
        rows, harder, Measure(), costs=COSTS, seeds=(0,), splits=10,
    )  # fmt: skip
    json.dumps(report)
    assert [set(row) >= {"target", "realised", "quality", "baselines"} for row in report["budget"]]
    for row in report["budget"]:
        assert set(row["baselines"]) == {"static", "global", "msdnet", "random"}
    assert [row["delta"] for row in report["risk"]] == [0.02, 0.05, 0.1]
    for row in report["risk"]:
        assert {"epsilon", "splits", "violations", "coverage", "oracle_coverage"} <= set(row)
    assert set(report["adaptive"]) == {"probes", "switches", "replicas"}
    # A draft step of a whole second: no policy is a noticeable part of it.
    assert 0 < report["overhead_percent"] < 0.1
    alone = bench(rows, None, Measure(), costs=COSTS, seeds=(0,), splits=2)
    assert set(alone["adaptive"]) == {"probes"} and "shift" not in alone


def test_the_engines_own_code_decides(rows: TraceRows, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    original = LivePolicies.threshold_for

    def spy(self: LivePolicies, compute: ComputePolicy, exited: int, decided: int) -> float | None:
        asked.append(decided)
        return original(self, compute, exited, decided)

    monkeypatch.setattr(LivePolicies, "threshold_for", spy)
    few = rows.select(rows.groups < 3)
    live_exits(few, Measure(), 0.6)
    assert max(asked) == 29 and asked.count(0) == 3
