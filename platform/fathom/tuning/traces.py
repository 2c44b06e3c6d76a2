"""Traces: every draft of a run with what the deep stage said of it, in a Parquet file."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from fathom import __version__
from fathom.engine.trace import DraftRecord
from fathom.exits.calibration import TEMPERATURES

if TYPE_CHECKING:
    from fathom.engine.engine import Engine

VERSION = "2"
"""Of the schema. 1 had the columns up to ``exited``."""

RECORD_AGAIN = (
    "record it again with this version: fathom generate --prompts FILE --mode free "
    "--exit-threshold 1 --trace OUT"
)

SCHEMA = pa.schema(
    [
        ("request", pa.string()),
        ("index", pa.int32()),
        ("position", pa.int32()),
        ("num_prompt", pa.int32()),
        ("confidence", pa.float32()),
        ("entropy", pa.float32()),
        ("shallow_token", pa.int32()),
        ("deep_token", pa.int32()),
        ("agrees", pa.bool_()),
        ("exited", pa.bool_()),
        ("probe", pa.bool_()),
        ("max_prob", pa.float32()),
        ("saturation", pa.float32()),
        ("best_logit", pa.float32()),
        ("second_logit", pa.float32()),
        ("deep_logit", pa.float32()),
        ("lse", pa.list_(pa.float32(), len(TEMPERATURES))),
    ]
)
"""One row a draft; see ``fathom.engine.trace.DraftRecord``. A trace with exit states has one
column more, ``hidden``: fixed_size_binary, float16, little-endian."""

_ROWS_AT_ONCE = 8_192


class TraceWriter:
    """Writes a trace while an engine runs; give ``add`` to ``Engine.trace``.

    Args:
        path: the file; it takes its place when the trace is closed, so that no half file is read.
        metadata: kept in the file's schema; see ``describe``.
    """

    def __init__(self, path: Path, metadata: dict[str, str]) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._metadata = {**metadata, "version": VERSION}
        self._writer: pq.ParquetWriter | None = None
        self._schema = SCHEMA
        self._rows: list[tuple[object, ...]] = []

    def add(self, record: DraftRecord) -> None:
        """Note one draft."""
        r = record
        row = (
            r.request_id, r.index, r.position, r.num_prompt, r.confidence, r.entropy,
            r.shallow_token, r.deep_token, r.agrees, r.exited, r.probe, r.max_prob, r.saturation,
            r.best_logit, r.second_logit, r.deep_logit, r.lse,
        )  # fmt: skip
        if not self._rows and self._writer is None and r.hidden is not None:
            self._schema = SCHEMA.append(pa.field("hidden", pa.binary(len(r.hidden))))
        self._rows.append(row if r.hidden is None else (*row, r.hidden))
        if len(self._rows) >= _ROWS_AT_ONCE:
            self._write()

    def close(self) -> None:
        """Write what is left and put the file in its place."""
        self._write()
        assert self._writer is not None
        self._writer.close()
        self._partial.replace(self._path)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _write(self) -> None:
        if self._writer is None:  # the first record has told whether there are exit states
            self._schema = self._schema.with_metadata(self._metadata)
            self._writer = pq.ParquetWriter(self._partial, self._schema, compression="zstd")
        if self._rows:
            columns = zip(*self._rows, strict=True)
            arrays = [
                pa.array(c, field.type) for c, field in zip(columns, self._schema, strict=True)
            ]
            self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
            self._rows = []


def describe(engine: Engine) -> dict[str, str]:
    """What a trace must say of the engine that made it: identity, and what its tokens cost.

    ``exit_cost`` is that of ``ModelCosts``; ``stage_costs_ms`` are the stages' measured passes,
    {stage: {rows: ms}} in JSON.
    """
    info, costs = engine.info, engine.stage_costs
    curves = {"shallow": costs.shallow, "shallow_full": costs.shallow_full, "deep": costs.deep}
    names = (
        "model", "weights_digest", "adapter", "adapter_digest", "exit_layer", "exit_depth",
        "exit_vocab", "num_layers", "dtype", "quantization",
    )  # fmt: skip
    return {
        **{name: str(getattr(info, name)) for name in names},
        "exit_cost": str(engine.ledger.costs.exit_cost),
        "stage_costs_ms": json.dumps(
            {
                name: {str(rows): seconds * 1e3 for rows, seconds in curve.as_dict().items()}
                for name, curve in curves.items()
            }
        ),
        "fathom": __version__,
    }


def read_trace(path: Path) -> pa.Table:
    """Read a trace.

    Raises:
        ValueError: for a file that is missing, no Parquet, lacks a column, or was written by
            another version; the message names the remedy.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: cannot read the trace: {error}") from error
    names = set(table.column_names)
    missing = [name for name in SCHEMA.names if name not in names]
    version = (table.schema.metadata or {}).get(b"version", b"1").decode()
    if missing and names.issuperset(SCHEMA.names[: SCHEMA.get_field_index("exited") + 1]):
        raise ValueError(
            f"{path}: a trace of version {version}, which lacks {missing[0]!r}; {RECORD_AGAIN}."
        )
    if missing:
        raise ValueError(f"{path}: no trace: it has no column {missing[0]!r}.")
    if version != VERSION:
        raise ValueError(
            f"{path}: a trace of version {version}, this one reads {VERSION}; {RECORD_AGAIN}."
        )
    return table
