"""The report of a baseline: which figures are beside which, and which way the ratios go."""

from __future__ import annotations

import pytest

from fathom.evaluation.bootstrap import Interval
from fathom.tuning.baseline import Measured, report_of
from fathom.tuning.finalists import Verified
from fathom.tuning.live_figures import NOTHING, LiveFigures
from fathom.tuning.space import Space
from fathom.tuning.study import Study
from fathom.tuning.study_live import Live

STUDY = Study(name="s", space=Space(max_num_seqs=8), live=Live(cpus=2))


def live(
    tpot: float | None, full: float | None, rate: float, full_rate: float | None = None
) -> LiveFigures:
    def at(value: float | None) -> Interval:
        return NOTHING if value is None else Interval(value, value - 1, value + 1)

    return LiveFigures(
        quality=at(1.0), budget=at(1.0), exit_rate=at(0.0), rescored=NOTHING,
        full_rescored=NOTHING, tpot_ms=at(tpot), full_tpot_ms=at(full), speedup=NOTHING,
        tokens_per_s=rate, full_tokens_per_s=full_rate, requests=4, tokens=32,
    )  # fmt: skip


def finalist(*figures: LiveFigures) -> Verified:
    return Verified(3, "front-1", {}, ["a", "b"][: len(figures)], [], list(figures), 1.0)


def test_each_data_set_is_compared_with_its_own() -> None:
    found = Measured(["a", "b"], [live(10, None, 100), live(30, None, 50)], 60.0)
    own = finalist(live(5, 20, 150, 80), live(60, 40, 25, 40))
    report = report_of(STUDY, found, [own])
    assert (report["tpot_ms"], report["tokens_per_s"]) == (20, 75)
    assert report["over_full"] == 30 / 20
    assert (report["requests"], report["tokens"], report["max_num_seqs"]) == (8, 64, 8)
    first, second = report["finalists"]
    assert (first["data"], first["speedup"], first["throughput_ratio"]) == ("a", 2, 1.5)
    assert (first["full_speedup"], first["full_throughput_ratio"]) == (0.5, 0.8)
    assert (second["data"], second["speedup"], second["throughput_ratio"]) == ("b", 0.5, 0.5)
    assert [(row["ci_low"], row["ci_high"]) for row in report["data"]] == [(9, 11), (29, 31)]


def test_what_was_not_measured_has_no_ratio() -> None:
    found = Measured(["a"], [live(None, None, 100)], 60.0)
    report = report_of(STUDY, found, [finalist(live(5, 20, 150, 80))])
    assert report["tpot_ms"] is report["over_full"] is report["finalists"][0]["speedup"] is None
    assert report["finalists"][0]["throughput_ratio"] == pytest.approx(1.5)


def test_a_missing_one_says_why() -> None:
    report = report_of(STUDY, Measured([], [], 1.0, "no vLLM"), [finalist(live(5, 20, 150, 80))])
    assert report == {"name": "vLLM, full depth", "missing": "no vLLM"}
