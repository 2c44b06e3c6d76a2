"""The drift alarm: rarely false, soon there, and over when the workload returns."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator

import numpy as np
import pytest
from scipy.stats import binom

from fathom.exits.drift import AGREEMENT, CONFIDENCES, RETURN_AFTER, Expected, Level, PointWatch
from fathom.exits.shadow import Shadowed
from fathom.exits.shadow_watch import DEFAULT, OTHER, ShadowWatch
from fathom.types import AcceptMode
from tests.shadows import FREE, completion, expected_of, until_alarm


@pytest.fixture(scope="module")
def expected() -> Expected:
    return expected_of(np.random.default_rng(0), loss=0.08)


def stream(seed: int, **changes: float) -> Iterator[Shadowed]:
    rng = np.random.default_rng(seed)
    while True:
        yield completion(rng, **changes)


def test_without_drift_there_is_no_alarm(expected: Expected) -> None:
    watches = [PointWatch(expected, 0.05) for _ in range(12)]
    assert [until_alarm(w, stream(i), 600) for i, w in enumerate(watches)] == [None] * 12
    assert all(watch.alarms == 0 for watch in watches)


def test_at_the_very_bounds_false_alarms_are_as_rare_as_stated() -> None:
    """The worst that is no drift: every mean is exactly at its bound."""
    alpha, streams = 0.2, 150
    level = Level(bin=40, share=0.45, tolerance=0.05)
    bounds = Expected(compute=FREE, loss=0.1, measure="softmax_gap", levels=(level,))
    false = 0
    for seed in range(streams):
        rng = np.random.default_rng(seed)
        watch = PointWatch(bounds, alpha)
        for _ in range(400):
            above, wrong = int(rng.integers(0, 11)), int(rng.random() < 0.5) * 2
            rows = [0] * 64
            rows[50], rows[10] = above, 10 - above
            each = Shadowed("p", FREE, asked=10, decided=10, wrong=wrong, rows=rows)
            if watch.observe(each):
                break
        false += watch.alarms
    assert false <= binom.ppf(0.9999, streams, alpha)


def test_a_bound_that_is_broken_is_noticed_at_that_size() -> None:
    """The bounds of the test above, and a mean that is only a little beyond them."""
    level = Level(bin=40, share=0.45, tolerance=0.05)
    bounds = Expected(compute=FREE, loss=0.1, measure="softmax_gap", levels=(level,))
    rng, watch = np.random.default_rng(0), PointWatch(bounds, 0.2)
    for _ in range(400):
        rows = [0] * 64
        rows[50] = above = int(rng.integers(2, 11))
        rows[10] = 10 - above
        watch.observe(Shadowed("p", FREE, asked=10, decided=10, wrong=0, rows=rows))
    assert watch.alarms == 1


@pytest.mark.parametrize(
    ("change", "reason", "most"),
    [
        ({"loss": 0.25}, AGREEMENT, 120),
        ({"alpha": 1.5, "beta": 2.0}, CONFIDENCES, 80),  # less sure
        ({"alpha": 9.0}, CONFIDENCES, 80),  # surer: no promise is broken, and depth is wasted
    ],
)
def test_a_switch_is_noticed_and_its_end_too(
    expected: Expected, change: dict[str, float], reason: str, most: int
) -> None:
    watch = PointWatch(expected, 0.05)
    assert until_alarm(watch, stream(1), 500) is None
    assert until_alarm(watch, stream(2, **change), most) is not None
    assert reason in watch.reasons
    assert watch.alarms == 1
    for each, _ in zip(stream(3, **change), range(300), strict=False):
        watch.observe(each)
        assert watch.reasons  # as long as it lasts
    assert 40 <= max(watch.figures()["evidence"].values()) < 1e4  # what raised it
    for back, each in enumerate(stream(4), 1):
        watch.observe(each)
        if not watch.reasons:
            break
        assert back <= 2 * RETURN_AFTER
    assert until_alarm(watch, stream(5), 300) is None
    assert watch.alarms == 1


def test_a_return_takes_time(expected: Expected) -> None:
    """An alarm is not over after a few good completions."""
    watch = PointWatch(expected, 0.05)
    assert until_alarm(watch, stream(1, loss=0.5), 200) is not None
    for each, _ in zip(stream(2), range(RETURN_AFTER - 1), strict=False):
        assert not watch.observe(each)
    assert watch.reasons


def test_other_confidences_say_nothing_of_levels(expected: Expected) -> None:
    watch = PointWatch(dataclasses.replace(expected, measure="max_prob"), 0.05)
    assert until_alarm(watch, stream(1, alpha=0.3), 200) is None


def test_nothing_expected_is_nothing_to_alarm_of() -> None:
    watch = PointWatch(Expected(), 0.05)
    assert until_alarm(watch, stream(1, loss=0.9), 200) is None
    figures = watch.figures()
    assert figures["evidence"] == {}
    assert figures["psi"] is None
    assert figures["agreement"] < 0.2


def test_figures_are_of_what_was_seen(expected: Expected) -> None:
    watch = PointWatch(expected, 0.05)
    assert watch.figures()["agreement"] is None
    seen = [each for each, _ in zip(stream(1), range(400), strict=False)]
    for each in seen:
        watch.observe(each)
    watch.observe(Shadowed("p", FREE))  # ended before its first token
    found = watch.figures()
    assert found["completions"] == 400
    assert found["decided"] == found["asked"] == found["exited"] == 400 * 20
    assert found["wrong"] == sum(each.wrong for each in seen)
    assert found["layers_per_token"] == pytest.approx(12)
    assert found["exit_rate"] == 1
    weights = 0.5 ** (np.arange(399, -1, -1) / 200)
    wrong = np.array([each.wrong for each in seen]) / 20
    assert found["agreement"] == pytest.approx(1 - np.average(wrong, weights=weights))
    by = found["by_confidence"]
    assert sum(each["rows"] for each in by) == pytest.approx(20 * weights.sum())
    assert found["psi"] < 0.02
    for each, _ in zip(stream(2, alpha=1.0), range(800), strict=False):
        watch.observe(each)
    assert watch.figures()["psi"] > 0.25


def test_mode_copy_has_no_agreement_by_confidence(expected: Expected) -> None:
    watch = PointWatch(Expected(), 0.05)
    copy = dataclasses.replace(FREE, mode=AcceptMode.COPY)
    watch.observe(completion(np.random.default_rng(0), compute=copy))
    assert watch.figures()["by_confidence"] == []
    assert watch.figures()["agreement"] is not None


def test_completions_count_for_the_point_whose_settings_they_had(expected: Expected) -> None:
    watch = ShadowWatch(0.05)
    own = dataclasses.replace(FREE, operating_point="", exit_threshold=0.7)
    watch.expect({"p": expected, DEFAULT: Expected(compute=own)})
    rng = np.random.default_rng(0)
    for compute in (
        FREE,
        dataclasses.replace(FREE, load_aware=False),
        dataclasses.replace(FREE, exit_threshold=0.2),  # names the point, and changes it
        own,
        dataclasses.replace(own, exit_threshold=0.1),
        dataclasses.replace(FREE, operating_point="gone"),
    ):
        watch.take([completion(rng, compute=compute)])
    counts = {name: point["completions"] for name, point in watch.points().items()}
    assert counts == {"p": 2, DEFAULT: 1, OTHER: 3}


def test_completions_wait_until_it_is_known_what_to_expect(expected: Expected) -> None:
    watch, rng = ShadowWatch(0.05), np.random.default_rng(0)
    watch.take(completion(rng) for _ in range(5))
    assert watch.points() == {}
    watch.expect({"p": expected})
    watch.take([completion(rng)])
    assert {name: p["completions"] for name, p in watch.points().items()} == {"p": 6}


def test_a_point_that_means_something_else_begins_anew(
    expected: Expected, caplog: pytest.LogCaptureFixture
) -> None:
    watch = ShadowWatch(0.05)
    watch.expect({"p": expected})
    with caplog.at_level(logging.WARNING):
        watch.take(each for each, _ in zip(stream(1, loss=0.6), range(200), strict=False))
    assert watch.alert
    (record,) = caplog.records
    assert "Run `fathom tune` again on a fresh trace." in record.message
    assert "at least 0.9200 was promised" in record.message
    watch.expect({"p": expected})
    assert watch.points()["p"]["completions"] == 200
    watch.expect({"p": dataclasses.replace(expected, loss=0.9)})
    assert not watch.alert
    assert watch.points() == {}


def test_the_log_hears_of_the_all_clear(
    expected: Expected, caplog: pytest.LogCaptureFixture
) -> None:
    watch = ShadowWatch(0.05)
    watch.expect({"p": expected})
    with caplog.at_level(logging.WARNING):
        watch.take(each for each, _ in zip(stream(1, loss=0.6), range(200), strict=False))
        watch.take(each for each, _ in zip(stream(2), range(400), strict=False))
    assert not watch.alert
    assert len(caplog.records) == 2
    assert "again as it was measured on" in caplog.records[1].message
