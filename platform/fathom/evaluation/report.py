"""The rows as a table for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table

from fathom.evaluation.session import Row

_COLUMNS = (
    ("agreement", "agreement", "{:.1%}"),
    ("coverage@95", "coverage_at_precision_95", "{:.1%}"),
    ("accepted", "acceptance", "{:.0%}"),
    ("exits", "exit_rate", "{:.0%}"),
    ("layers/tok", "layers_per_token", "{:.1f}"),
    ("tok/s", "tokens_per_s", "{:.1f}"),
    ("x full", "speedup_over_full", "{:.2f}"),
)
WIDTH = 180


def build_table(rows: Sequence[Row], title: str, describe_mode: Callable[[str], str]) -> Table:
    """One section a task; the columns that no row has a figure for are left out.

    Args:
        describe_mode: a mode's name with whether it is lossless.
    """
    table = Table(title=title, title_justify="left")
    for name in ("task", "mode", "metric"):
        table.add_column(name, no_wrap=True)
    for name in ("n", "value", "95% interval"):
        table.add_column(name, justify="right")
    columns = [column for column in _COLUMNS if any(row[column[1]] is not None for row in rows)]  # type: ignore[literal-required]
    for heading, _, _ in columns:
        table.add_column(heading, justify="right")
    previous: Row | None = None
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        cells = []
        # Depth and speed are the mode's, whatever the metric: said once.
        again = previous is not None and _place(previous) == _place(row)
        for _, name, form in columns:
            value = row[name]  # type: ignore[literal-required]
            cells.append("" if again else "–" if value is None else form.format(value))
        previous = row
        table.add_row(
            row["task"],
            describe_mode(row["mode"]),
            row["metric"] or "–",
            str(row["n"]),
            _number(row["value"]),
            "–" if row["ci_low"] is None else f"{_number(row['ci_low'])}–{_number(row['ci_high'])}",
            *cells,
            end_section=following is not None and following["task"] != row["task"],
        )
    return table


def _place(row: Row) -> tuple[str, str]:
    return row["task"], row["mode"]


def _number(value: float | None) -> str:
    """Three digits behind the point for shares and nats, one for BLEU and perplexities."""
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
