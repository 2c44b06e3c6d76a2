"""The losses of requests as text: what a file of operating points keeps of a trace."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathom.exits.histogram import edges
from fathom.exits.risk import Losses, Unit

_BINS = 128
_ABOUT = (
    "counts by request and confidence bin: base64 of zlib of uint16 little-endian "
    "[2, requests, bins]; rows that disagree, then all; bin i holds arcsine-spaced confidences "
    "(fathom.exits.histogram.edges), the surest first"
)


def grid() -> NDArray[np.float64]:
    """Thresholds of a table, descending: all inner edges of its bins."""
    return edges(_BINS)[-2:0:-1]


def encode_losses(table: Losses) -> dict[str, Any]:
    """A table over ``grid`` as YAML can hold it.

    Raises:
        ValueError: for a table over another grid, or with more than 65,535 rows of a request.
    """
    if not np.array_equal(table.grid, grid()):
        raise ValueError("losses must be over loss_table.grid() to be written.")
    if table.rows.max(initial=0) > np.iinfo(np.uint16).max:
        raise ValueError("a request has more than 65535 rows: too many to be written.")
    counts = [
        np.diff(each, axis=1, prepend=0, append=total)
        for each, total in (
            (table.wrong, table.wrong[:, -1:]),  # what is wrong in the last bin never counts
            (table.exits, table.rows[:, None]),
        )
    ]
    raw = np.stack(counts).astype("<u2").tobytes()
    return {
        "about": _ABOUT,
        "unit": table.unit.value,
        "requests": len(table.rows),
        "bins": _BINS,
        "counts": base64.b64encode(zlib.compress(raw, 9)).decode(),
    }


def decode_losses(body: Mapping[str, Any]) -> Losses:
    """The inverse of ``encode_losses``.

    Raises:
        ValueError: for counts that are damaged. KeyError: for a field that is missing.
    """
    units, bins = int(body["requests"]), int(body["bins"])
    if bins != _BINS:
        raise ValueError(f"calibration.bins must be {_BINS}, got {bins}")
    try:
        raw = zlib.decompress(base64.b64decode(body["counts"], validate=True))
        counts = np.frombuffer(raw, "<u2").reshape(2, units, bins).astype(np.int32)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"calibration.counts is damaged ({error})") from error
    wrong, exits = counts.cumsum(axis=2, dtype=np.int32)
    return Losses(
        grid(), exits[:, -1].astype(np.int64), wrong[:, :-1], exits[:, :-1], Unit(body["unit"])
    )
