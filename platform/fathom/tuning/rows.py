"""A trace as arrays: what calibration, replays and operating points work on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

from fathom.engine.costs import CostCurve, StageCosts
from fathom.exits.calibration import TEMPERATURES, probability_at
from fathom.tuning.traces import read_trace
from fathom.types import ComputePolicy, Confidence

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Integers = NDArray[np.int64]

SAME = (
    ("weights_digest", "model"),
    ("adapter_digest", "adapter"),
    ("exit_layer", "exit layer"),
    ("exit_vocab", "exit vocabulary"),
    ("dtype", "dtype"),
)
"""Fields that engines must have in common for a confidence to mean the same, and their names."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a trace says of the engine that made it; see ``fathom.tuning.traces.describe``.

    Attributes:
        exit_cost: of a token decided at the exit, as a share of a full one's.
        costs: measured seconds of the stages' passes.
        quantization: as ``EngineConfig.quantization``.
    """

    model: str
    weights_digest: str
    adapter: str
    adapter_digest: str
    exit_layer: int
    exit_depth: int
    exit_vocab: int
    num_layers: int
    dtype: str
    exit_cost: float
    costs: StageCosts
    quantization: str = "none"


@dataclass(frozen=True, slots=True, eq=False)
class TraceRows:
    """The rows of a trace, in its order: that in which the deep stage judged them.

    Attributes:
        name: of the file. exit: what a study calls the exit that it is of; empty where it has but
            one. source: the engine that made it.
        requests: the requests' ids, in order of appearance.
        groups: [n] number of each row's request: its place in ``requests``.
        position: [n] of the row in its sequence.
        agrees, exited, probe: [n]. gap, max_prob, saturation: [n] confidences at temperature 1.
        entropy: [n] in nats. best, second, deep: [n] logits. lse: [n, 16].
        hidden: [n, d] float16 exit states, or None.
    """

    name: str
    exit: str
    source: Source
    requests: tuple[str, ...]
    groups: Integers
    position: Integers
    agrees: Bools
    exited: Bools
    gap: Floats
    max_prob: Floats
    saturation: Floats
    entropy: Floats
    best: Floats
    second: Floats
    deep: Floats
    lse: Floats
    hidden: NDArray[np.float16] | None

    def __len__(self) -> int:
        return len(self.agrees)

    @property
    def num_requests(self) -> int:
        """Requests that have rows here."""
        return len(np.unique(self.groups))

    @property
    def agreement(self) -> float:
        """Share of rows whose draft is the deep stage's choice; NaN without rows."""
        return float(self.agrees.mean()) if len(self) else math.nan

    def select(self, rows: Bools | Integers) -> TraceRows:
        """Some of the rows, by mask or index, in that order."""
        values: dict[str, Any] = {
            name: array[rows]
            for name in self.__dataclass_fields__
            if isinstance(array := getattr(self, name), np.ndarray)
        }
        return replace(self, **values)

    def halves(self, seed: int, share: float = 0.5) -> tuple[TraceRows, TraceRows]:
        """Two parts of whole requests, at random: ``share`` of them, and the rest.

        Raises:
            ValueError: if there are fewer than two requests.
        """
        names = np.unique(self.groups)
        if len(names) < 2:
            raise ValueError(
                f"{self.name}: holds {len(names)} request, and whole requests are held out: "
                "trace at least 2."
            )
        first = np.random.default_rng(seed).permutation(names)
        count = min(max(1, round(share * len(names))), len(names) - 1)
        inside = np.isin(self.groups, first[:count])
        return self.select(inside), self.select(~inside)

    def confidence(self, measure: Confidence, temperature: float = 1.0) -> Floats:
        """Confidence of each row, [n] in [0, 1], as the engine takes it.

        Entropy at another temperature follows from log-sum-exp alone: with u = 1 / T,
        H = lse - u d lse / du.

        Args:
            measure: any but ``meta``, which needs a classifier: see ``tuning.meta``.
            temperature: of the exit head; ``saturation`` does not depend on it.

        Raises:
            ValueError: for ``meta``, or a temperature outside ``TEMPERATURES``.
        """
        match measure:
            case Confidence.SATURATION:
                return self.saturation
            case Confidence.SOFTMAX_GAP:
                if temperature == 1:
                    return self.gap
                first, second = (
                    probability_at(logit, self.lse, temperature)
                    for logit in (self.best, self.second)
                )
                return np.asarray(np.clip(first - second, 0, 1))
            case Confidence.MAX_PROB:
                if temperature == 1:
                    return self.max_prob
                return probability_at(self.best, self.lse, temperature)
            case Confidence.ENTROPY:
                nats = self.entropy if temperature == 1 else self._entropy_at(temperature)
                return np.asarray(np.clip(1 - nats / math.log(self.source.exit_vocab), 0, 1))
            case Confidence.META:
                raise ValueError("confidence meta needs a trained classifier and exit states.")

    def _entropy_at(self, temperature: float) -> Floats:
        logs = np.log(TEMPERATURES)
        # The best logit taken out, the rest is small and smooth; d / d log u = - d / d log T.
        rest = self.lse - self.best[:, None] / np.asarray(TEMPERATURES)
        spline = CubicSpline(logs, rest, axis=1)
        at = math.log(temperature)
        return np.asarray(np.maximum(spline(at) + spline(at, 1), 0))


@dataclass(frozen=True, slots=True)
class Measure:
    """What λ is compared with: a confidence measure at a temperature of the exit head."""

    confidence: Confidence = Confidence.SOFTMAX_GAP
    temperature: float = 1.0

    def of(self, rows: TraceRows) -> Floats:
        """[n] confidences of the rows; see ``TraceRows.confidence``."""
        return rows.confidence(self.confidence, self.temperature)

    def policy(self, **fields: Any) -> ComputePolicy:
        """A compute policy of these fields that uses it."""
        return ComputePolicy(
            confidence=self.confidence, exit_temperature=self.temperature, **fields
        )


def read_rows(path: Path) -> TraceRows:
    """Read a trace as arrays.

    Raises:
        ValueError: see ``read_trace``; or for one without rows.
    """
    table = read_trace(path)
    if not table.num_rows:
        raise ValueError(f"{path}: the trace has no rows: it was recorded without drafts.")
    metadata = {key.decode(): v.decode() for key, v in (table.schema.metadata or {}).items()}
    requests = table["request"].to_numpy()
    names, first, inverse = np.unique(requests, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    hidden = None
    if "hidden" in table.column_names:
        raw = b"".join(table["hidden"].to_pylist())
        hidden = np.frombuffer(raw, "<f2").reshape(table.num_rows, -1)

    def floats(name: str) -> Floats:
        return np.asarray(table[name].to_numpy(), np.float64)

    flat = table["lse"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return TraceRows(
        name=path.name,
        exit="",
        source=_source(path, metadata),
        requests=tuple(names[np.argsort(first)].tolist()),
        groups=rank[inverse],
        position=np.asarray(table["position"].to_numpy(), np.int64),
        agrees=np.asarray(table["agrees"].to_numpy(), bool),
        exited=np.asarray(table["exited"].to_numpy(), bool),
        gap=floats("confidence"),
        max_prob=floats("max_prob"),
        saturation=floats("saturation"),
        entropy=floats("entropy"),
        best=floats("best_logit"),
        second=floats("second_logit"),
        deep=floats("deep_logit"),
        lse=np.asarray(flat, np.float64).reshape(table.num_rows, len(TEMPERATURES)),
        hidden=hidden,
    )


def _source(path: Path, metadata: Mapping[str, str]) -> Source:
    try:
        curves = {
            name: CostCurve(tuple((int(rows), ms / 1e3) for rows, ms in curve.items()))
            for name, curve in json.loads(metadata["stage_costs_ms"]).items()
        }
        identity = ("model", "weights_digest", "adapter", "adapter_digest", "dtype")
        sizes = ("exit_layer", "exit_depth", "exit_vocab", "num_layers")
        values: dict[str, Any] = {
            **{name: metadata[name] for name in identity},
            **{name: int(metadata[name]) for name in sizes},
            "quantization": metadata.get("quantization", "none"),
        }
        return Source(**values, exit_cost=float(metadata["exit_cost"]), costs=StageCosts(**curves))
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: the trace does not say what made it ({error}); traces of `fathom generate`, "
            "`bench engine` and `eval` do."
        ) from error
