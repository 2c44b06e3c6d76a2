"""From a study's trials to operating points that `fathom serve` loads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fathom.compute import Confidence
from fathom.exits.calibration import fit_temperature
from fathom.exits.risk import losses
from fathom.tuning.ledger import Trial
from fathom.tuning.loss_table import grid
from fathom.tuning.objective import Figures, compute_of, evaluate, reference, with_first_threshold
from fathom.tuning.operating_points import Calibration, Identity, OperatingPoints, Point
from fathom.tuning.pareto import hypervolume, on_front
from fathom.tuning.ratios import serve_options
from fathom.tuning.rows import Measure
from fathom.tuning.study import Study
from fathom.tuning.study_live import ONLY
from fathom.tuning.study_traces import Traces


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


def point_names(study: Study, trials: Sequence[Trial]) -> dict[int, str]:
    """Names of the operating points by trial: ``front-1`` and so on, from the least quality lost;
    see ``spanning``.
    """
    found = spanning(study, front(study, trials))
    return {trial.number: f"front-{place}" for place, trial in enumerate(found, 1)}


def make_points(
    study: Study, traces: Traces, trials: Sequence[Trial]
) -> dict[str, OperatingPoints]:
    """The front as operating points, measured on the held-out requests, by the exit they are of.

    A file of points belongs to one engine, so the points of two exits go to two files.
    """
    names = point_names(study, trials)
    found: dict[str, dict[str, Point]] = {}
    for trial in (trial for trial in front(study, trials) if trial.number in names):
        exit_name, name = trial.setting.get("exit", ONLY), names[trial.number]
        own = traces.of(exit_name)
        rows = own.choose[0]
        compute = with_first_threshold(compute_of(trial.setting, rows.source.exit_cost), rows)
        found.setdefault(exit_name, {})[name] = Point(
            dataclasses.replace(compute, operating_point=name),
            {**_measured(evaluate(trial.setting, own.held_out), own), **_served(study, trial)},
            f"trial {trial.number} of study {study.name}{_needs(study, trial)}",
        )
    return {
        name: OperatingPoints("", _identity(own), points, _calibration(study, own))
        for name, points in found.items()
        for own in (traces.of(name),)
    }


def with_live(
    points: Mapping[str, OperatingPoints], found: Mapping[str, Mapping[str, float]]
) -> dict[str, OperatingPoints]:
    """Points with what was measured live beside the replay's figures.

    Args:
        points: by exit. found: by point's name, more of ``measured``.
    """
    return {
        name: dataclasses.replace(
            own,
            points={
                key: dataclasses.replace(point, measured={**point.measured, **found.get(key, {})})
                for key, point in own.points.items()
            },
        )
        for name, own in points.items()
    }


def _identity(traces: Traces) -> Identity:
    source = traces.choose[0].source
    fields = Identity.__dataclass_fields__
    return Identity(
        **{name: getattr(source, name) for name in fields if hasattr(source, name)},
        trace=" ".join(path.name for path in traces.paths),
        trace_sha256=" ".join(traces.digests),
    )


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


def _served(study: Study, trial: Trial) -> dict[str, float]:
    """What an application gave, on the trials' own requests: a replay foretells none of it."""
    if not study.is_served:
        return {}
    own = trial.figures
    return {
        "served_agreement": round(own.quality, 4),
        "served_exit_rate": round(own.exit_rate, 4),
        "served_tpot_ms": round(own.tpot_ms, 4),
        "served_tokens_per_s": round(own.tokens_per_s, 4),
    }


def _needs(study: Study, trial: Trial) -> str:
    """In words, what a server must have besides the point for what was measured."""
    own = {key: value for key, value in trial.setting.items() if key in study.beyond_replay}
    if not own:
        return ""
    if not study.is_served:
        return f", measured with {json.dumps(own)}"
    options = serve_options(trial.setting, study.live.cpus)
    return f", served with {json.dumps(own)} on {study.live.cpus:g} cores: fathom serve {options}"


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
    study: Study, trials: Sequence[Trial], points: Mapping[str, OperatingPoints]
) -> list[dict[str, Any]]:
    """The whole front as a report holds it: settings, and the trials' own figures.

    Those that became operating points have their name and the figures of held-out requests, the
    others None.

    Args:
        points: see ``make_points``.
    """
    names = point_names(study, trials)
    rows: list[dict[str, Any]] = []
    for trial in front(study, trials):
        name = names.get(trial.number)
        own = points.get(trial.setting.get("exit", ONLY))
        held_out = None if name is None or own is None else dict(own.points[name].measured)
        rows.append(
            {
                "point": name,
                "trial": trial.number,
                "setting": trial.setting,
                **dataclasses.asdict(trial.figures),
                "held_out": held_out,
            }
        )
    return rows
