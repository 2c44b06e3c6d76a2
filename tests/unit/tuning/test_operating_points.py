"""Operating points: chosen and measured on a trace, kept in a file, refused by another model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import yaml

from fathom.checks import InvalidRequest
from fathom.compute import AcceptMode, ComputePolicy, Confidence, PolicyName
from fathom.engine.info import EngineInfo
from fathom.exits.p_values import Bound
from fathom.exits.risk import TooLittleData, certify, losses
from fathom.settings import ConfigError
from fathom.tuning.loss_table import decode_losses, encode_losses, grid
from fathom.tuning.operating_points import OperatingPoints, load
from fathom.tuning.points_fit import Fitted, digest, fit_points
from fathom.tuning.rows import TraceRows, read_rows
from tests.traces import write_trace

INFO = EngineInfo(
    model="tiny", adapter="small", adapter_digest="adapter-1", num_layers=6, exit_layer=2,
    exit_depth=3, exit_vocab=50, vocab_size=50, max_model_len=64, dtype="float32",
    eos_token_ids=(0,), weights_digest="weights-1", num_blocks=8, block_size=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TraceRows]:
    path = tmp_path_factory.mktemp("trace") / "t.parquet"
    write_trace(path, requests=300, temperature=1.4, scale=4)
    return path, read_rows(path)


@pytest.fixture(scope="module")
def fitted(trace: tuple[Path, TraceRows]) -> Fitted:
    path, rows = trace
    return fit_points(rows, path, risks=(0.05, 0.2), fast_agreement=0.85)


@pytest.fixture
def points(fitted: Fitted, tmp_path: Path) -> OperatingPoints:
    fitted.points.save(tmp_path / "points.yaml")
    return load(tmp_path / "points.yaml")


def test_what_is_saved_is_read(fitted: Fitted, points: OperatingPoints) -> None:
    made = fitted.points
    assert points.identity == made.identity
    assert points.points == made.points
    own, theirs = points.calibration, made.calibration
    assert (own.confidence, own.exit_temperature) == (theirs.confidence, theirs.exit_temperature)
    for name in ("grid", "rows", "exits", "wrong"):
        assert (getattr(own.losses, name) == getattr(theirs.losses, name)).all(), name


def test_the_points_keep_what_they_say(
    trace: tuple[Path, TraceRows], fitted: Fitted, points: OperatingPoints
) -> None:
    path, rows = trace
    assert points.identity.trace_sha256 == digest(path)
    assert fitted.temperature is not None
    assert fitted.temperature.temperature == pytest.approx(1.4, rel=0.15)
    exact, balanced, fast = (points.points[name] for name in ("exact", "balanced", "fast"))
    assert exact.compute.mode is AcceptMode.EXACT and exact.measured["agreement"] == 1
    assert balanced.compute.policy is PolicyName.RISK
    assert balanced.measured["agreement"] >= 0.95
    assert fast.measured["agreement"] == pytest.approx(0.85, abs=0.04)
    assert fast.compute.budget is not None
    assert fast.measured["budget"] == pytest.approx(fast.compute.budget, rel=0.02)
    assert fast.measured["budget"] < balanced.measured["budget"] < 1
    # Chosen on some requests, measured on the others.
    assert fast.measured["held_out_requests"] == 210 < rows.num_requests


def test_certificates_are_those_of_the_held_out_rows(
    trace: tuple[Path, TraceRows], fitted: Fitted, points: OperatingPoints
) -> None:
    _, rows = trace
    _, rest = rows.halves(0, 0.3)
    temperature = points.calibration.exit_temperature
    values = rest.confidence(Confidence.SOFTMAX_GAP, temperature)
    for delta in (0.05, 0.2):
        wanted = certify(values, rest.agrees, rest.groups, delta, 0.1, grid=grid())
        assert points.certify(delta, 0.1).threshold == wanted.threshold
        assert wanted.threshold in {each.threshold for each in fitted.certificates}
        assert (rest.agrees | (values <= wanted.threshold)).mean() >= 1 - delta
    with pytest.raises(TooLittleData, match=r"210 requests.*would do"):
        points.certify(0.001, 0.01)


def test_a_promise_too_large_for_the_trace_is_none(trace: tuple[Path, TraceRows]) -> None:
    path, rows = trace
    few = rows.select(rows.groups < 20)
    fitted = fit_points(few, path, risks=(0.05,))
    assert "cannot be promised from 14 requests" in fitted.refused[0.05]
    balanced = fitted.points.points["balanced"]
    assert balanced.compute.policy is PolicyName.THRESHOLD
    assert "no promise" in balanced.note


def test_betting_is_kept_in_the_file(trace: tuple[Path, TraceRows], tmp_path: Path) -> None:
    path, rows = trace
    fitted = fit_points(rows, path, risks=(0.2,), bound=Bound.BETTING)
    fitted.points.save(tmp_path / "points.yaml")
    found = load(tmp_path / "points.yaml").certify(0.2, 0.1)
    assert found.bound is Bound.BETTING
    assert found.threshold == fitted.certificates[0].threshold


def test_names_resolve_to_policies(points: OperatingPoints) -> None:
    for name in ("exact", "balanced", "fast"):
        compute = points.resolve(name)
        compute.validate()
        assert compute.operating_point == name
        assert compute.exit_temperature == points.calibration.exit_temperature
    assert points.for_effort("low") == points.resolve("fast")
    assert points.for_effort("medium") == points.resolve("balanced")
    assert points.for_effort("high") == points.resolve("exact")
    with pytest.raises(InvalidRequest, match="one of exact, balanced, fast, got 'turbo'"):
        points.resolve("turbo")
    with pytest.raises(InvalidRequest, match="one of low, medium, high, got 'extreme'"):
        points.for_effort("extreme")


def test_any_risk_and_budget_gets_a_threshold(points: OperatingPoints) -> None:
    asked = ComputePolicy(mode=AcceptMode.FREE, policy=PolicyName.RISK, risk=0.1)
    careful = dataclasses.replace(asked, risk_confidence=0.999)
    one, other = (points.with_risk(each).exit_threshold for each in (asked, careful))
    assert one is not None and other is not None
    assert one == points.certify(0.1, 0.1).threshold < other
    thresholds = [
        points.with_budget(
            ComputePolicy(mode=AcceptMode.FREE, policy=PolicyName.BUDGET, budget=budget)
        ).exit_threshold
        for budget in (0.3, 0.5, 0.7, 0.9, 1.0)
    ]
    assert thresholds == sorted(thresholds)  # type: ignore[type-var]
    table = points.calibration.losses
    for share in (0.1, 0.4, 0.8):
        place = int(np.searchsorted(-table.grid, -points.threshold_at(share)))
        above = table.exits.sum(axis=0) / table.rows.sum()
        assert above[place - 1] - 0.05 <= share <= above[place] + 0.05
    with pytest.raises(InvalidRequest, match=r"budget must be at least 0\.25"):
        points.with_budget(
            ComputePolicy(mode=AcceptMode.FREE, policy=PolicyName.BUDGET, budget=0.1)
        )


def test_points_of_ones_own(points: OperatingPoints, tmp_path: Path) -> None:
    path = tmp_path / "points.yaml"
    body = yaml.safe_load(path.read_text())
    body["points"]["mine"] = {"compute": {"mode": "rollback", "policy": "budget", "budget": 0.6}}
    body["points"]["safe"] = {"compute": {"mode": "free", "policy": "risk", "risk": 0.2}}
    path.write_text(yaml.safe_dump(body))
    again = load(path)
    mine, safe = again.resolve("mine"), again.resolve("safe")
    assert mine.mode is AcceptMode.ROLLBACK and mine.operating_point == "mine"
    assert mine.exit_threshold is not None
    assert safe.exit_threshold == again.certify(0.2, 0.1).threshold


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("weights_digest", "w2", r"another model: weights_digest weights-1 \(tiny\).*has w2"),
        ("adapter_digest", "a2", r"another adapter: adapter_digest adapter-1 \(small\).*has a2"),
        ("adapter_digest", "", "this engine has none"),
        ("exit_layer", 3, "exit_layer 2, this engine has 3"),
        ("exit_vocab", 40, "exit_vocab 50, this engine has 40"),
        ("dtype", "bfloat16", "dtype float32, this engine has bfloat16"),
    ],
)
def test_another_engine_is_refused(
    points: OperatingPoints, field: str, value: object, says: str
) -> None:
    points.check(INFO)
    changes = {field: value, **({"adapter": ""} if value == "" else {})}
    with pytest.raises(ConfigError, match=says) as caught:
        points.check(dataclasses.replace(INFO, **changes))
    assert "fathom calibrate fit" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda body: body.update(version=9), "version 9, this version of Fathom reads 1"),
        (lambda body: body.pop("calibration"), "'calibration' is missing"),
        (lambda body: body["measured_on"].pop("dtype"), "dtype"),
        (lambda body: body["calibration"].update(counts="AAAA"), "counts is damaged"),
        (lambda body: body["calibration"].update(confidence="luck"), "'luck'"),
        (lambda body: body["points"].update(bad=3), r"points\.bad: needs compute"),
        (
            lambda body: body["points"].update(bad={"compute": {"lambda": 1}}),
            r"points\.bad\.compute\.lambda: unknown setting",
        ),
        (
            lambda body: body["points"].update(bad={"compute": {"exit_threshold": 2}}),
            r"points\.bad\.compute: exit_threshold must be a number in \[0, 1\], got 2",
        ),
    ],
)
def test_a_file_at_fault_is_named(points: OperatingPoints, tmp_path: Path, change, says) -> None:
    path = tmp_path / "points.yaml"
    body = yaml.safe_load(path.read_text())
    change(body)
    path.write_text(yaml.safe_dump(body))
    with pytest.raises(ConfigError, match=says) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_table_over_another_grid_is_not_written() -> None:
    table = losses([0.2, 0.8], [True, False], [0, 1], grid=[0.5])
    with pytest.raises(ValueError, match="grid"):
        encode_losses(table)


def test_losses_survive_as_text() -> None:
    random = np.random.default_rng(1)
    confidence, agrees = random.random(500), random.random(500) < 0.7
    confidence[:5] = (0, 1, np.nan, 1e-9, 1 - 1e-12)
    table = losses(confidence, agrees, random.integers(0, 40, 500), grid=grid())
    again = decode_losses(encode_losses(table))
    for name in ("grid", "rows", "wrong", "exits"):
        np.testing.assert_array_equal(getattr(again, name), getattr(table, name))
    assert again.unit is table.unit
