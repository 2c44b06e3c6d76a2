"""From runs to rows of the report: medians, percentiles, ratios."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from fathom.bench.ideal import Costs, ideal_speedup, in_step_speedup
from fathom.bench.measure import Contender, FathomContender, Run, median_ratio, percentile
from fathom.types import PolicyName

Key = tuple[str, str, int]
"""Engine, mode, batch size."""


def key_of(contender: Contender, batch: int) -> Key:
    """Where a contender's runs at a batch size belong."""
    return contender.engine, contender.mode, batch


def build_rows(
    contenders: Sequence[Contender],
    batches: Sequence[int],
    runs: Mapping[Key, Sequence[Run]],
    *,
    costs: Costs,
    dtype: str,
    threads: int,
) -> list[dict[str, Any]]:
    """One row a contender and batch size that has a run; None where a figure has no meaning.

    ``bytes_per_s`` and ``over_copy`` are for who knows the machine (``bench.roofline``) to fill in.
    """
    rows = []
    for batch in batches:
        full = runs.get(("fathom", "full", batch), ())
        for contender in contenders:
            own = runs.get(key_of(contender, batch), ())
            if not own:
                continue
            row = {
                "engine": contender.engine,
                "mode": contender.mode,
                "batch": batch,
                "dtype": dtype,
                "threads": threads,
                "exit_threshold": _threshold(contender),
                **_times(own),
                **_compute(own[-1]),
                "speedup_over_full": _speedup(own, full),
                "ideal_speedup": None,
                "measured_over_ideal": None,
                "in_step_speedup": None,
                "bytes_per_s": None,
                "over_copy": None,
                "requests": len(own[-1].token_ids),
                "requests_differing_from_full": None,
                "runs": [round(run.tokens_per_s, 3) for run in own],
            }
            if own is not full and full:
                row["requests_differing_from_full"] = sum(
                    a != b for a, b in zip(own[-1].token_ids, full[-1].token_ids, strict=True)
                )
            if isinstance(contender, FathomContender) and contender.compute.drafts:
                case = {
                    "batch": batch,
                    "exit_rate": row["exit_rate"],
                    "max_stack": contender.compute.max_stack,
                }
                ideal = ideal_speedup(costs, **case)
                row["ideal_speedup"] = ideal
                row["in_step_speedup"] = in_step_speedup(costs, **case)
                if row["speedup_over_full"] is not None:
                    row["measured_over_ideal"] = row["speedup_over_full"] / ideal
            rows.append(row)
    return rows


def _threshold(contender: Contender) -> float | None:
    """The threshold as it applied, where one decided."""
    if not isinstance(contender, FathomContender) or not contender.compute.drafts:
        return None
    compute = contender.compute
    return compute.threshold if compute.policy is PolicyName.THRESHOLD else None


def _times(runs: Sequence[Run]) -> dict[str, Any]:
    ttft = [seconds for run in runs for seconds in run.ttft]
    tpot = [seconds for run in runs for seconds in run.tpot]
    return {
        "tokens_per_s": statistics.median(run.tokens_per_s for run in runs),
        "ttft_ms_p50": _ms(percentile(ttft, 50)),
        "ttft_ms_p95": _ms(percentile(ttft, 95)),
        "tpot_ms_p50": _ms(percentile(tpot, 50)),
        "tpot_ms_p95": _ms(percentile(tpot, 95)),
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _compute(run: Run) -> dict[str, Any]:
    """The ledger's figures: greedy runs of equal prompts all have the same."""
    page = run.compute
    return {
        "exit_rate": page.exit_rate if page else None,
        "acceptance_rate": page.acceptance_rate if page else None,
        "layers_per_token": page.layers_per_token if page else None,
        "mean_depth": page.mean_depth if page else None,
        "rows_per_flush": page.flush_rows / run.flushes if page and run.flushes else None,
        "flops": page.flops if page else None,
    }


def _speedup(own: Sequence[Run], full: Sequence[Run]) -> float | None:
    return median_ratio(
        [run.tokens_per_s for run in own], [run.tokens_per_s for run in full]
    )  # fmt: skip


_COLUMNS = (
    ("tok/s", "tokens_per_s", "{:.1f}"),
    ("x full", "speedup_over_full", "{:.2f}"),
    ("ideal", "ideal_speedup", "{:.2f}"),
    ("of ideal", "measured_over_ideal", "{:.2f}"),
    ("TTFT p50", "ttft_ms_p50", "{:.0f} ms"),
    ("TPOT p50", "tpot_ms_p50", "{:.1f} ms"),
    ("p95", "tpot_ms_p95", "{:.1f} ms"),
    ("exits", "exit_rate", "{:.0%}"),
    ("accepted", "acceptance_rate", "{:.0%}"),
    ("layers/tok", "layers_per_token", "{:.1f}"),
    ("rows/flush", "rows_per_flush", "{:.1f}"),
    ("GFLOP", "flops", "{:.0f}"),
    ("of copy", "over_copy", "{:.2f}"),
    ("differ", "requests_differing_from_full", "{}"),
)


def build_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """The rows as a table for a terminal."""
    table = Table(title=title, title_justify="left")
    for name in ("engine", "mode", "batch"):
        table.add_column(name)
    for heading, _, _ in _COLUMNS:
        table.add_column(heading, justify="right")
    for row in rows:
        cells = []
        for _, name, form in _COLUMNS:
            value = row[name]
            if name == "flops" and value is not None:
                value /= 1e9
            cells.append("–" if value is None else form.format(value))
        table.add_row(row["engine"], row["mode"], str(row["batch"]), *cells)
    return table
