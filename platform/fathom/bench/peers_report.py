"""Rows of ``fathom bench peers``: those of ``bench engine``, with bits, spread and agreement."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from fathom.bench.ideal import Costs
from fathom.bench.measure import Contender, Run, median_ratio
from fathom.bench.report import build_rows, key_of

Key = tuple[str, int]
"""``Entry.name``, batch size."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A contender with what a reader must know of it.

    Attributes:
        bits: a weight of its linear layers. peer: its name; empty for our own engine.
        costs: of our own engine's stages; a peer's are not used.
    """

    contender: Contender
    bits: int
    dtype: str
    costs: Costs
    peer: str = ""

    @property
    def name(self) -> str:
        """Unlike that of any other entry."""
        return f"{self.contender.engine} {self.contender.mode} {self.bits}"


def build_peer_rows(
    entries: Sequence[Entry],
    batches: Sequence[int],
    runs: Mapping[Key, Sequence[Run]],
    *,
    threads: int,
) -> list[dict[str, Any]]:
    """One row an entry and batch size that has a run.

    ``speedup_over_full`` is over mode ``full`` of our engine: of the same bits, and for peers of
    the first that has it. ``over_reference`` is over the first entry, whatever it is.
    """
    rows = []
    for batch in batches:
        reference = runs.get((entries[0].name, batch), ())
        for entry in entries:
            own = runs.get((entry.name, batch), ())
            if not own:
                continue
            full = _full_runs(entries, entry, batch, runs)
            known = {("fathom", "full", batch): full, key_of(entry.contender, batch): own}
            (row,) = build_rows(
                [entry.contender], [batch], known,
                costs=entry.costs, dtype=entry.dtype, threads=threads,
            )  # fmt: skip
            row |= {"bits": entry.bits, "peer": entry.peer}
            row |= _spread(own)
            row["over_reference"] = median_ratio(
                [run.tokens_per_s for run in own], [run.tokens_per_s for run in reference]
            )
            row |= agreement(own[-1], reference[-1] if reference else None)
            rows.append(row)
    return rows


def _full_runs(
    entries: Sequence[Entry], entry: Entry, batch: int, runs: Mapping[Key, Sequence[Run]]
) -> Sequence[Run]:
    for other in entries:
        if (
            not other.peer
            and other.contender.mode == "full"
            and (entry.peer or other.bits == entry.bits)
        ):
            return runs.get((other.name, batch), ())
    return ()


def _spread(runs: Sequence[Run]) -> dict[str, float]:
    rates = [run.tokens_per_s for run in runs]
    middle = statistics.median(rates)
    return {
        "tokens_per_s_min": min(rates),
        "tokens_per_s_max": max(rates),
        "spread": (max(rates) - min(rates)) / middle,
    }


def agreement(own: Run, reference: Run | None) -> dict[str, float | None]:
    """How far two runs of the same prompts say the same.

    Returns:
        ``same_first_token``: share of requests whose first tokens are equal; ``common_tokens``:
        mean number of leading tokens that are equal. None without a reference.
    """
    if reference is None:
        return {"same_first_token": None, "common_tokens": None}
    common = [
        _common(a, b) for a, b in zip(own.token_ids, reference.token_ids, strict=True)
    ]  # fmt: skip
    return {
        "same_first_token": sum(count > 0 for count in common) / len(common),
        "common_tokens": sum(common) / len(common),
    }


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    for count, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return count
    return min(len(a), len(b))


_COLUMNS = (
    ("bits", "bits", "{}"),
    ("batch", "batch", "{}"),
    ("tok/s", "tokens_per_s", "{:.1f}"),
    ("least", "tokens_per_s_min", "{:.1f}"),
    ("most", "tokens_per_s_max", "{:.1f}"),
    ("x first", "over_reference", "{:.2f}"),
    ("TTFT p50", "ttft_ms_p50", "{:.0f} ms"),
    ("TPOT p50", "tpot_ms_p50", "{:.1f} ms"),
    ("TPOT p95", "tpot_ms_p95", "{:.1f} ms"),
    ("same 1st token", "same_first_token", "{:.0%}"),
    ("same tokens", "common_tokens", "{:.1f}"),
)


def build_peer_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """The rows as a table for a terminal."""
    table = Table(title=title, title_justify="left")
    table.add_column("engine")
    table.add_column("mode")
    for heading, _, _ in _COLUMNS:
        table.add_column(heading, justify="right")
    for row in rows:
        cells = ["–" if row[name] is None else form.format(row[name]) for _, name, form in _COLUMNS]
        table.add_row(row["engine"], row["mode"], *cells)
    return table
