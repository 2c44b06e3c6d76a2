"""What the exit policies of several engines have seen, taken together.

Counts of confidences add up (``exits.histogram``). A ``Board`` keeps the latest word of every
engine, and tells each what all the others have seen, as one sum; ``merged`` is for who wants to
look at all of them.

Each engine forgets by its own rows, so that together they remember a number of rows that grows with
the engines, over the same time. One that sees no rows would never forget; the board tells it how
many rows it has missed, and it forgets as if it had seen as many as the others did on average.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathom.exits.beta_mixture import fit_em
from fathom.exits.histogram import ConfidenceHistogram, Kind

SILENT_S = 15.0
"""Seconds without a word after which an engine is taken to be gone."""

_HISTORY = 512


@dataclass(slots=True)
class _Told:
    """What one engine has said of one measure.

    Attributes:
        counts: [3, bins]. seen: rows ever.
        grown: rows that it has seen since the board knows it. others: ``grown`` of its peers, all
            together, when it last spoke. idle: it had seen no more than the time before.
    """

    counts: NDArray[np.float64]
    half_life: float | None
    seen: int
    grown: int = 0
    others: int = 0
    idle: bool = False


@dataclass(slots=True)
class _Engine:
    group: str
    heard: float
    measures: dict[str, _Told] = field(default_factory=dict)


class Board:
    """The latest word of every engine. Not thread-safe.

    Args:
        silent_s: see ``SILENT_S``.
    """

    def __init__(self, silent_s: float = SILENT_S) -> None:
        self._silent_s = silent_s
        self._engines: dict[str, _Engine] = {}

    def __len__(self) -> int:
        return len(self._engines)

    def exchange(
        self, name: str, group: str, snapshot: Mapping[str, Any], now: float
    ) -> list[dict[str, Any]]:
        """Take in what an engine has seen, and tell it what the others have.

        Args:
            name: of the engine.
            group: of the engines whose confidences mean the same: same weights, same exit.
            snapshot: see ``LivePolicies.snapshot``.
            now: seconds.

        Returns:
            what ``LivePolicies.merge`` takes: one snapshot, the sum of the others', or none.

        Raises:
            ValueError: for what is no snapshot.
        """
        heard = _read(snapshot)
        before = self._engines.get(name)
        if before is not None and before.group != group:
            before = None
        self._engines[name] = _Engine(group, now, heard)
        for each in [n for n, e in self._engines.items() if now - e.heard > self._silent_s]:
            del self._engines[each]
        peers = [e.measures for n, e in self._engines.items() if n != name and e.group == group]
        missed: dict[str, float] = {}
        for measure, told in heard.items():
            told.others = sum(each[measure].grown for each in peers if measure in each)
            if before is None:
                continue
            last = before.measures.get(measure)
            told.grown = told.seen if last is None else last.grown + max(told.seen - last.seen, 0)
            told.idle = last is not None and last.seen == told.seen
            # Only from the second time on: what others saw since an engine's latest rows, and what
            # they saw before, is the same to the first.
            if last is not None and last.idle and told.idle and peers:
                # A peer that went away takes its rows along.
                missed[measure] = max(told.others - last.others, 0) / len(peers)
        return [_sum(peers, missed)] if peers else []


def _sum(engines: Sequence[Mapping[str, _Told]], missed: Mapping[str, float]) -> dict[str, Any]:
    """What engines have seen together, as a snapshot; with what one of their peers has missed."""
    measures = {}
    for measure in dict.fromkeys(name for each in engines for name in each):
        same = [each[measure] for each in engines if measure in each]
        measures[measure] = {
            "histogram": {
                "bins": same[0].counts.shape[1],
                "half_life": same[0].half_life,
                "seen": sum(told.seen for told in same),
                "counts": np.sum([told.counts for told in same], axis=0).tolist(),
            },
            "missed": missed.get(measure, 0.0),
        }
    return {"measures": measures}


def _read(snapshot: Mapping[str, Any]) -> dict[str, _Told]:
    try:
        found = {
            str(name): ConfidenceHistogram.from_dict(measure["histogram"])
            for name, measure in snapshot["measures"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no snapshot of exit policies: {error!r}.") from error
    return {name: _Told(each.counts, each.half_life, each.seen) for name, each in found.items()}


def merged(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What several engines have seen together, and what follows from it, as JSON can hold it.

    Args:
        states: ``LivePolicies.snapshot`` of each, with its ``group`` (see ``Board.exchange``)
            where there are several. Only those of the largest group are taken.

    Returns:
        ``engines``: how many; ``measures``: by name the rows by verdict, the mixture, the λ of
        policy ``adaptive`` now (``adaptive_threshold``) and over time (``history``: rows seen and
        λ, as the engines had it); ``promises``: of policy ``risk``, added up.

    Raises:
        ValueError: for what is no state.
    """
    groups = Counter(str(state.get("group", "")) for state in states)
    largest = groups.most_common(1)[0][0] if groups else ""
    taken = [state for state in states if str(state.get("group", "")) == largest]
    names = sorted({name for state in taken for name in state["measures"]})
    measures = {
        name: _merged_measure([s["measures"][name] for s in taken if name in s["measures"]])
        for name in names
    }
    promises = _merged_promises(each for state in taken for each in state.get("promises", ()))
    return {"engines": len(taken), "measures": measures, "promises": promises}


def _merged_measure(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    histograms = [ConfidenceHistogram.from_dict(each["histogram"]) for each in found]
    total = sum(histograms[1:], start=histograms[0])
    mixture = fit_em(total)
    rows = {
        kind.name.lower(): sum(each["rows"][kind.name.lower()] for each in found) for kind in Kind
    }
    history = sorted(tuple(entry) for each in found for entry in each["history"])
    return {
        "histogram": total.to_dict(),
        "rows": rows,
        "mixture": dataclasses.asdict(mixture),
        "adaptive_threshold": mixture.threshold(),
        "history": [list(entry) for entry in history[-_HISTORY:]],
    }


def _merged_promises(promises: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Promises of equal measure, risk and threshold as one.

    Evidence is the engines' mean, weighed by nothing: the mean of e-processes is one too.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for each in promises:
        groups.setdefault((each["confidence"], each["risk"], each["threshold"]), []).append(each)
    found = []
    for (confidence, risk, threshold), same in sorted(groups.items()):
        completions = sum(each["completions"] for each in same)
        observed = sum(each["observed"] * each["completions"] for each in same)
        found.append(
            {
                "confidence": confidence,
                "risk": risk,
                "threshold": threshold,
                "completions": completions,
                "observed": observed / max(completions, 1),
                "evidence": sum(each["evidence"] for each in same) / len(same),
                "alert": any(each["alert"] for each in same),
            }
        )
    return found
