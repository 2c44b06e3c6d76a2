"""From a study's trials to operating points that `fathom serve` loads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fathom.compute import Confidence
from fathom.exits.calibration import fit_temperature
from fathom.exits.risk import losses
from fathom.settings import ConfigError
from fathom.tuning import asha
from fathom.tuning.budget_replay import first_threshold
from fathom.tuning.ledger import Trial
from fathom.tuning.loss_table import grid
from fathom.tuning.objective import Figures, compute_of, evaluate, first_rows, reference
from fathom.tuning.operating_points import Calibration, Identity, OperatingPoints, Point
from fathom.tuning.pareto import hypervolume, on_front
from fathom.tuning.points_fit import digest
from fathom.tuning.rows import Measure, TraceRows, read_rows
from fathom.tuning.study import Study

_SAME = (
    ("weights_digest", "model"),
    ("adapter_digest", "adapter"),
    ("exit_layer", "exit layer"),
    ("exit_vocab", "exit vocabulary"),
    ("dtype", "dtype"),
)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Traces:
    """A study's data sets.

    Attributes:
        paths: of the files. digests: their sha256, in the same order.
        choose: rows that trials are replayed on. rest: of the other requests, all of them.
    """

    paths: list[Path]
    digests: list[str]
    choose: list[TraceRows]
    rest: list[TraceRows]

    @property
    def parts(self) -> list[tuple[TraceRows, TraceRows]]:
        """What ``evaluate`` takes for a trial."""
        return [(rows, rows) for rows in self.choose]

    @property
    def held_out(self) -> list[tuple[TraceRows, TraceRows]]:
        """What ``evaluate`` takes to measure a point."""
        return list(zip(self.choose, self.rest, strict=True))


def read_traces(study: Study, folder: Path) -> Traces:
    """Read a study's traces and hold requests out.

    Args:
        folder: of the study's file.

    Raises:
        ConfigError: for a trace that cannot be used, or of another engine than the first.
    """
    paths = [folder / name for name in study.traces]
    choose, rest = [], []
    first: TraceRows | None = None
    for path in paths:
        try:
            rows = read_rows(path)
            halves = rows.halves(study.seed, study.choose_share)
        except ValueError as error:
            raise ConfigError(f"traces: {error}") from error
        if left := int(rows.exited.sum()):
            raise ConfigError(
                f"traces: {path}: {left} of {len(rows)} rows left at the exit when it was "
                "recorded, so a threshold has chosen its rows: record it with --mode free "
                "--exit-threshold 1."
            )
        first = rows if first is None else first
        for name, what in _SAME:
            one, other = getattr(first.source, name), getattr(rows.source, name)
            if one != other:
                raise ConfigError(
                    f"traces: {path} is of another {what} than {paths[0]} ({name} {other!r}, "
                    f"not {one!r}): a study is of one engine; trace both with it."
                )
        choose.append(first_rows(halves[0], study.max_rows))
        rest.append(halves[1])
    traces = Traces(paths, [digest(path) for path in paths], choose, rest)
    asha.rungs(study, traces.parts)  # says so now if they are too short
    return traces


def volume(study: Study, trials: Sequence[Trial]) -> float:
    """Hypervolume of the trials that keep to the constraints, as a share of the whole box."""
    limit = reference(study)
    values = [t.figures.losses(study) for t in trials if _kept(study, t)]
    return hypervolume(np.array(values).reshape(-1, len(limit)), limit) / float(np.prod(limit))


def front(study: Study, trials: Sequence[Trial]) -> list[Trial]:
    """Trials on the front that keep to the constraints, from the least quality lost."""
    kept = [trial for trial in trials if _kept(study, trial)]
    if not kept:
        return []
    values = np.array([trial.figures.losses(study) for trial in kept])
    found = [trial for trial, inside in zip(kept, on_front(values), strict=True) if inside]
    return sorted(found, key=lambda t: (1 - t.figures.quality, t.figures.tpot_ms, t.number))


def spanning(study: Study, found: Sequence[Trial]) -> list[Trial]:
    """At most ``max_points`` of a front, in its order; each adds the most hypervolume to the last.

    Taking them so gives at least 1 - 1/e of the volume that the best choice of as many has
    (Nemhauser et al. 1978, for hypervolume is submodular).
    """
    if len(found) <= study.max_points:
        return list(found)
    taken: list[Trial] = []
    for _ in range(study.max_points):
        rest = [trial for trial in found if trial not in taken]
        taken.append(max(rest, key=lambda trial: volume(study, [*taken, trial])))
    return [trial for trial in found if trial in taken]


def _kept(study: Study, trial: Trial) -> bool:
    """Whether a trial counts: measured on all rows, and within the constraints."""
    missed = trial.figures.violations(study).values()
    return trial.rung is None and all(value <= 0 for value in missed)


def make_points(study: Study, traces: Traces, trials: Sequence[Trial]) -> OperatingPoints:
    """The front as operating points, measured on the held-out requests.

    Points are named ``front-1`` and so on, from the least quality lost; see ``spanning``.
    """
    source = traces.choose[0].source
    fields = Identity.__dataclass_fields__
    identity = Identity(
        **{name: getattr(source, name) for name in fields if hasattr(source, name)},
        trace=" ".join(path.name for path in traces.paths),
        trace_sha256=" ".join(traces.digests),
    )
    points = {}
    for place, trial in enumerate(spanning(study, front(study, trials)), 1):
        name = f"front-{place}"
        compute = compute_of(trial.setting, source.exit_cost)
        if compute.budget is not None and compute.exit_threshold is None:
            measure = Measure(compute.confidence, compute.exit_temperature)
            first = first_threshold(traces.choose[0], measure, compute.budget)
            compute = dataclasses.replace(compute, exit_threshold=first)
        figures = evaluate(trial.setting, traces.held_out)
        points[name] = Point(
            dataclasses.replace(compute, operating_point=name),
            _measured(figures, traces),
            f"trial {trial.number} of study {study.name}",
        )
    return OperatingPoints("", identity, points, _calibration(study, traces))


def _measured(figures: Figures, traces: Traces) -> dict[str, float]:
    """Under the names that `fathom calibrate fit` uses, and the predicted time."""
    return {
        "agreement": round(figures.quality, 4),
        "exit_rate": round(figures.exit_rate, 4),
        "budget": round(figures.budget, 4),
        "predicted_speedup": round(figures.full_tpot_ms / figures.tpot_ms, 4),
        "predicted_tpot_ms": round(figures.tpot_ms, 4),
        "held_out_requests": sum(rows.num_requests for rows in traces.rest),
        "held_out_rows": sum(len(rows) for rows in traces.rest),
    }


def _calibration(study: Study, traces: Traces) -> Calibration:
    """A table of the held-out requests, by the space's first measure, at its fitted temperature."""
    confidence = Confidence(study.space.dimensions()["confidence"].values[0])
    measure = Measure(confidence)
    if confidence is not Confidence.SATURATION:
        deep = np.concatenate([rows.deep for rows in traces.choose])
        lse = np.concatenate([rows.lse for rows in traces.choose])
        measure = Measure(confidence, round(fit_temperature(deep, lse).temperature, 3))
    # Requests of several data sets are numbered on.
    starts = np.cumsum([0, *(int(rows.groups.max()) + 1 for rows in traces.rest)])
    table = losses(
        np.concatenate([measure.of(rows) for rows in traces.rest]),
        np.concatenate([rows.agrees for rows in traces.rest]),
        np.concatenate([r.groups + s for r, s in zip(traces.rest, starts, strict=False)]),
        grid=grid(),
    )
    return Calibration(measure.confidence, measure.temperature, table)


def front_rows(
    study: Study, trials: Sequence[Trial], points: OperatingPoints
) -> list[dict[str, Any]]:
    """The whole front as a report holds it: settings, and the replay's figures.

    Those that became operating points have their name and the figures of held-out requests, the
    others None.
    """
    found = front(study, trials)
    names = dict(zip((t.number for t in spanning(study, found)), points.points, strict=True))
    rows: list[dict[str, Any]] = []
    for trial in found:
        name = names.get(trial.number)
        rows.append(
            {
                "point": name,
                "trial": trial.number,
                "setting": trial.setting,
                **dataclasses.asdict(trial.figures),
                "held_out": None if name is None else dict(points.points[name].measured),
            }
        )
    return rows
