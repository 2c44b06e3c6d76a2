"""Figures of a load: percentiles, goodput, options that become them, the plot."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fathom.bench.load_client import Answer
from fathom.bench.load_run import Load
from fathom.bench.serve_figures import load_row, meets
from fathom.bench.serve_plot import plot_sweep
from fathom.commands.options import UsageError
from fathom.commands.serve_load import limits, offered_loads, percentile_list

seconds = st.floats(0.001, 10)


def answer(ttft: float, gaps: list[float], error: str = "") -> Answer:
    return Answer(
        ttft=ttft, itl=gaps, latency=ttft + sum(gaps), prompt_tokens=3,
        output_tokens=1 + len(gaps), chunks=1 + len(gaps), error=error,
    )  # fmt: skip


answers = st.lists(st.builds(answer, seconds, st.lists(seconds, max_size=5)), min_size=1)


@given(answers, seconds)
def test_figures_are_those_of_numpy(found: list[Answer], duration: float) -> None:
    row = load_row(Load(answers=found, seconds=duration), slo_ms={}, percentiles=[50, 90, 99.9])
    ms = {
        "ttft": [1e3 * each.ttft for each in found],
        "e2el": [1e3 * each.latency for each in found],
        "itl": [1e3 * gap for each in found for gap in each.itl],
        "tpot": [1e3 * np.mean(each.itl) for each in found if each.itl],
    }
    for metric, values in ms.items():
        for percent in (50, 90, 99.9):
            expected = pytest.approx(np.percentile(values, percent)) if values else None
            assert row[f"p{percent:g}_{metric}_ms"] == expected
        assert row[f"std_{metric}_ms"] == (
            pytest.approx(np.std(values), abs=1e-6) if values else None
        )
    tokens = sum(each.tokens for each in found)
    assert row["output_throughput"] == pytest.approx(tokens / duration)
    assert row["total_token_throughput"] == pytest.approx((tokens + 3 * len(found)) / duration)
    assert row["request_goodput"] is None


@given(answers, seconds, seconds, seconds)
def test_goodput_is_what_keeps_every_limit(
    found: list[Answer], ttft: float, tpot: float, e2el: float
) -> None:
    slo = {"ttft": 1e3 * ttft, "tpot": 1e3 * tpot, "e2el": 1e3 * e2el}
    row = load_row(Load(answers=found, seconds=2.0), slo_ms=slo)
    good = sum(meets(each, slo) for each in found)
    assert row["request_goodput"] == good / 2
    assert row["request_goodput"] <= row["request_throughput"]
    # More limits never let more through.
    assert good <= min(sum(meets(each, {name: slo[name]}) for each in found) for name in slo)


def test_limits_are_met_exactly_or_not() -> None:
    one = answer(0.5, [])
    assert meets(one, {"ttft": 500, "tpot": 1e-9})
    assert not meets(one, {"ttft": 499.9})
    assert not meets(answer(0.1, [], error="timeout"), {})


def test_what_failed_is_in_no_latency() -> None:
    found = [answer(0.1, [0.2]), answer(9.0, [9.0], error="timeout"), Answer(error="http 500")]
    row = load_row(Load(answers=found, seconds=1.0), slo_ms={"ttft": 1e6})
    assert (row["completed"], row["failed"]) == (1, 2)
    assert row["errors"] == {"timeout": 1, "http 500": 1}
    assert row["p99_ttft_ms"] == pytest.approx(100)
    assert row["goodput_share"] == pytest.approx(1 / 3)
    nothing = load_row(Load(answers=found[1:], seconds=1.0), slo_ms={})
    assert (nothing["completed"], nothing["p50_ttft_ms"], nothing["compute"]) == (0, None, None)


def test_limits_in_words_and_with_commas() -> None:
    assert limits(["ttft:500", "tpot:50"]) == limits(["ttft:500,tpot:50"])
    assert limits(["e2e:3"]) == {"e2el": 3}
    assert limits(None) == {}
    for wrong in ("ttft", "ttft:x", "ttft:0", "speed:3", ":5"):
        with pytest.raises(UsageError, match="--goodput must be as"):
            limits([wrong])


def test_percentiles_that_the_table_needs_are_there() -> None:
    assert percentile_list("90,99.9") == [50, 90, 99, 99.9]
    with pytest.raises(UsageError, match="numbers from 0 to 100"):
        percentile_list("101")


def test_sweeps_of_rates_and_of_concurrencies() -> None:
    options = argparse.Namespace(request_rate=9.0, max_concurrency=5, sweep_over="request-rate")
    options.sweep = None
    assert offered_loads(options) == [(9, 5)]
    options.sweep = "0.5,2"
    assert offered_loads(options) == [(0.5, 5), (2, 5)]
    options.sweep_over, options.sweep = "max-concurrency", "1,2"
    assert offered_loads(options) == [(9, 1), (9, 2)]
    for wrong in ("1.5", "0", "x", "inf"):
        options.sweep = wrong
        with pytest.raises(UsageError, match="--sweep must be a list of integers"):
            offered_loads(options)


@pytest.mark.parametrize("slo", [{}, {"ttft": 500.0}])
def test_a_sweep_is_drawn(tmp_path: Path, slo: dict[str, float]) -> None:
    rows = []
    for load in (1.0, 2.0, 4.0):
        found = [answer(0.1 * load, [0.02])] if load < 4 else [Answer(error="timeout")]
        row = load_row(Load(answers=found, seconds=1.0), slo_ms=slo)
        rows.append({"load": load, "slo_ms": slo, **row})
    path = plot_sweep(rows, tmp_path / "sweep.png", unit="requests/s", title="model")
    with Image.open(path) as image:
        assert image.size[0] > 1000
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50
