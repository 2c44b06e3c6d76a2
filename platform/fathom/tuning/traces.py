"""Traces: every draft of a run with what the deep stage said of it, in a Parquet file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from fathom.engine.trace import DraftRecord

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
    ]
)
"""One row a draft; see ``fathom.engine.trace.DraftRecord``."""

_ROWS_AT_ONCE = 65_536


class TraceWriter:
    """Writes a trace while an engine runs; give ``add`` to ``Engine.trace``.

    Args:
        path: the file; it takes its place when the trace is closed, so that no half file is read.
        metadata: kept in the file's schema: model, digests, adapter, policy.
    """

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._schema = SCHEMA.with_metadata(dict(metadata))
        self._writer = pq.ParquetWriter(self._partial, self._schema)
        self._rows: list[tuple[object, ...]] = []

    def add(self, record: DraftRecord) -> None:
        """Note one draft."""
        r = record
        self._rows.append(
            (
                r.request_id, r.index, r.position, r.num_prompt, r.confidence, r.entropy,
                r.shallow_token, r.deep_token, r.agrees, r.exited,
            )
        )  # fmt: skip
        if len(self._rows) >= _ROWS_AT_ONCE:
            self._write()

    def close(self) -> None:
        """Write what is left and put the file in its place."""
        self._write()
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
        if self._rows:
            columns = list(zip(*self._rows, strict=True))
            arrays = [
                pa.array(c, field.type) for c, field in zip(columns, self._schema, strict=True)
            ]
            self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
            self._rows = []


def read_trace(path: Path) -> pa.Table:
    """Read a trace.

    Raises:
        ValueError: for a file that is missing, no Parquet, or lacks a column.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: cannot read the trace: {error}") from error
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        raise ValueError(f"{path}: no trace: it has no column {missing[0]!r}.")
    return table
