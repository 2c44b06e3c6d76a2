"""The traces of a study, read and checked: what trials see, and what is held out from them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fathom.settings import ConfigError
from fathom.tuning import asha
from fathom.tuning.objective import first_rows
from fathom.tuning.points_fit import digest
from fathom.tuning.rows import SAME, TraceRows, read_rows
from fathom.tuning.study import Study


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Traces:
    """A study's data sets, those of all its exits; ``TraceRows.exit`` tells which.

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

    def of(self, name: str) -> Traces:
        """Those of one exit."""
        places = [place for place, rows in enumerate(self.choose) if rows.exit == name]
        return Traces(
            [self.paths[place] for place in places],
            [self.digests[place] for place in places],
            [self.choose[place] for place in places],
            [self.rest[place] for place in places],
        )


def read_traces(study: Study, folder: Path) -> Traces:
    """Read a study's traces and hold requests out.

    Args:
        folder: of the study's file.

    Raises:
        ConfigError: for a trace that cannot be used, of another engine than its exit's first, or
            of another model.
    """
    traces = Traces([], [], [], [])
    for name, own in study.exits_by_name.items():
        where = f"exits.{name}.traces" if name else "traces"
        first: TraceRows | None = None
        for path in (folder / each for each in own.traces):
            rows = dataclasses.replace(_read(path, where), exit=name)
            first = rows if first is None else first
            _check_same(where, path, first, rows)
            if traces.choose:
                _check_model(where, traces, path, rows)
            try:
                halves = rows.halves(study.seed, study.choose_share)
            except ValueError as error:
                raise ConfigError(f"{where}: {error}") from error
            traces.paths.append(path)
            traces.digests.append(digest(path))
            traces.choose.append(first_rows(halves[0], study.max_rows))
            traces.rest.append(halves[1])
    asha.rungs(study, traces.parts)  # says so now if they are too short
    return traces


def _read(path: Path, where: str) -> TraceRows:
    try:
        rows = read_rows(path)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    if left := int(rows.exited.sum()):
        raise ConfigError(
            f"{where}: {path}: {left} of {len(rows)} rows left at the exit when it was recorded, "
            "so a threshold has chosen its rows: record it with --mode free --exit-threshold 1."
        )
    return rows


def _check_same(where: str, path: Path, first: TraceRows, rows: TraceRows) -> None:
    for name, what in SAME:
        one, other = getattr(first.source, name), getattr(rows.source, name)
        if one != other:
            raise ConfigError(
                f"{where}: {path} is of another {what} than {first.name} ({name} {other!r}, not "
                f"{one!r}): these are of one engine; trace both with it, or name each of two exits "
                "under exits."
            )


def _check_model(where: str, traces: Traces, path: Path, rows: TraceRows) -> None:
    one, other = traces.choose[0].source.weights_digest, rows.source.weights_digest
    if one != other:
        raise ConfigError(
            f"{where}: {path} is of another model than {traces.paths[0]} (weights_digest "
            f"{other!r}, not {one!r}): the exits of a study are those of one model."
        )
