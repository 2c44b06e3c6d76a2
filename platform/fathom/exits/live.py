"""The exit policies of one engine at work: what they have seen, and what follows from it now.

``adaptive`` and ``budget`` read a threshold off the confidences of this engine's own rows; ``risk``
has a fixed one, whose promise is watched. What is kept of the rows are counts, so that replicas
add up theirs: each gives a ``snapshot`` of its own and takes the others' by ``merge``.

A threshold that follows traffic is part of what decides a token: the same request can exit
elsewhere at another time, or beside other requests. In modes ``full`` and ``exact`` (greedy) that
changes its speed alone.

In ``free``, ``rollback`` and ``exact`` a flush answers for every row that stands, exited or not, so
what is learned there has no selection bias, and probes add nothing to it. In ``copy`` the rows that
left are never looked at: probes alone tell of them, and their confidences are counted without a
label.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from fathom.exits.budget import exit_share
from fathom.exits.histogram import ConfidenceHistogram, Kind
from fathom.exits.observed import HALF_LIFE, Observed
from fathom.exits.promises import Promises
from fathom.types import ComputePolicy, Confidence, InvalidRequest, PolicyName

_MOST_MEASURES = 16
"""Kept apart; another takes the place of the one that was seen least."""

_PROBABILITIES = (Confidence.SOFTMAX_GAP, Confidence.MAX_PROB, Confidence.META)

_FIGURES_EVERY = 64
"""Rows between two tellings of the figures, which are asked for at every step."""

_FIRST_HORIZON = 8
"""Tokens within which a request makes up for what it has spent, before quantiles are known."""

_Key = tuple[Confidence, float, bool]


class LivePolicies:
    """Thresholds of this moment. Owned by one thread.

    Args:
        exit_cost: cost of a token that is decided at the exit, as a share of a full one's
            (``ModelCosts.exit_cost``).
        has_meta: whether a classifier for the confidence ``meta`` is loaded.
        estimator: of ``adaptive``: "em", or "moments" as FREE's official code.
        half_life: rows after which what was seen counts half.
    """

    def __init__(
        self,
        exit_cost: float,
        *,
        has_meta: bool = False,
        estimator: str = "em",
        half_life: float = HALF_LIFE,
    ) -> None:
        self._exit_cost = exit_cost
        self._has_meta = has_meta
        self._estimator = estimator
        self._half_life = half_life
        self._observed: dict[_Key, Observed] = {}
        self._promises = Promises()
        self._last_budget: dict[_Key, float] = {}
        self._figures: dict[str, float] = {}
        self._untold = 0

    def check(self, compute: ComputePolicy) -> None:
        """Check what can be promised here.

        Raises:
            InvalidRequest: naming the field, its value and the remedy.
        """
        if not compute.drafts:
            return
        if compute.confidence is Confidence.META and not self._has_meta:
            raise InvalidRequest(
                "confidence meta needs a trained classifier, and this engine has none: start it "
                "with one (setting meta), or ask for another confidence.",
                param="confidence",
            )
        if compute.policy is PolicyName.RISK and compute.exit_threshold is None:
            raise InvalidRequest(
                f"risk {compute.risk} needs an exit_threshold that is certified for it: a file of "
                "operating points holds the data for that.",
                param="risk",
            )
        if compute.policy is PolicyName.BUDGET:
            assert compute.budget is not None
            share = most_exits(compute)
            smallest = self.least_budget(compute)
            if compute.budget < smallest:
                # Rounded up, so that who takes the advice is not refused again.
                advice = math.ceil(1e4 * smallest) / 1e4
                raise InvalidRequest(
                    f"budget must be at least {advice:g}, got {compute.budget:g}: a token that "
                    f"exits costs {self._exit_cost:.3f}, and with max_stack {compute.max_stack} at "
                    f"most {share:.1%} of them can.",
                    param="budget",
                )

    def least_budget(self, compute: ComputePolicy) -> float:
        """The least share of full compute that tokens of a policy can cost."""
        return 1 - most_exits(compute) * (1 - self._exit_cost)

    def threshold_for(self, compute: ComputePolicy, exited: int, decided: int) -> float | None:
        """λ for one token: exit iff confidence > λ.

        ``adaptive`` takes it from the mixture over what was seen (``Observed.threshold``),
        ``budget`` from the quantiles (``QuantileTracker``), with what this request has spent fed
        back: rejected drafts, probes and full stacks cost full tokens and are made up for.

        Args:
            exited, decided: the request's output tokens so far that were decided at the exit, and
                all; drafts that wait for a verdict are in both.

        Returns:
            None where the request's own threshold holds.
        """
        if compute.policy is PolicyName.ADAPTIVE:
            return self._of(compute).threshold(compute.exit_threshold)
        if compute.policy is PolicyName.BUDGET:
            assert compute.budget is not None
            threshold = self._of(compute).quantile(compute.budget, exited, decided)
            if threshold is None and compute.exit_threshold is None:
                # Nothing is known yet: as if confidences were spread evenly.
                share = exit_share(compute.budget, self._exit_cost)
                threshold = 1 - share - (share * decided - exited) / _FIRST_HORIZON
            if threshold is not None:
                self._last_budget[_key(compute)] = threshold
            return threshold
        return None

    def observe(self, compute: ComputePolicy, confidence: float, agrees: bool | None) -> None:
        """Note one row of the exit head.

        Args:
            compute: of the row's request.
            confidence: by its own measure; one that is not finite is passed over.
            agrees: whether the head's best token is the deep stage's too; None where no flush will
                tell.
        """
        if not math.isfinite(confidence):
            return
        self._of(compute).add(confidence, agrees)
        self._untold += 1
        if self._untold >= _FIGURES_EVERY:
            self._tell()

    def completed(
        self, compute: ComputePolicy, *, exited: int, decided: int, asked: int, wrong: float
    ) -> None:
        """Note a completion that ended by itself: what it has spent, and how often it was wrong.

        Args:
            exited, decided: its tokens that were decided at the exit, and all.
            asked: rows at which the exit head spoke. wrong: those of them that left, or would have
                but for a probe, against the deep stage's choice; where only probes tell, each
                counts 1 / probe rate.
        """
        if compute.policy is PolicyName.BUDGET:
            assert compute.budget is not None
            self._of(compute).settle(compute.budget, exited, decided)
        told = compute.probes > 0 or not compute.copies_states
        if compute.policy is PolicyName.RISK and asked and told:
            self._promises.observe(_name(_key(compute)), compute, wrong / asked)
            self._tell()

    def figures(self) -> dict[str, float]:
        """Figures under the names of the metrics, as of at most 64 rows ago."""
        return self._figures

    def snapshot(self) -> dict[str, Any]:
        """The state as JSON can hold it: by measure, and the promises."""
        return {
            "exit_cost": self._exit_cost,
            "estimator": self._estimator,
            "measures": {_name(key): each.snapshot() for key, each in self._observed.items()},
            "promises": self._promises.snapshot(),
        }

    def merge(self, others: Iterable[Mapping[str, Any]]) -> None:
        """Take what other replicas have seen; it replaces what they had told before.

        Args:
            others: ``snapshot`` of every other replica, never one's own: nothing counts twice. A
                measure may say what was ``missed`` (see ``Observed.replace_others``).

        Raises:
            ValueError: for what is no snapshot.
        """
        found: dict[_Key, list[ConfidenceHistogram]] = {key: [] for key in self._observed}
        missed: dict[_Key, float] = {}
        for other in others:
            for name, measure in other["measures"].items():
                key = _parse(name)
                histogram = ConfidenceHistogram.from_dict(measure["histogram"])
                found.setdefault(key, []).append(histogram)
                missed[key] = missed.get(key, 0.0) + float(measure.get("missed", 0.0))
        for key, histograms in found.items():
            self._at(key).replace_others(histograms, missed.get(key, 0.0))
        self._tell()

    def _of(self, compute: ComputePolicy) -> Observed:
        return self._at(_key(compute))

    def _at(self, key: _Key) -> Observed:
        found = self._observed.get(key)
        if found is None:
            if len(self._observed) >= _MOST_MEASURES:
                least = min(self._observed, key=lambda k: self._observed[k].own.seen)
                del self._observed[least]
                self._last_budget.pop(least, None)
            found = self._observed[key] = Observed(
                self._exit_cost,
                estimator=self._estimator,
                half_life=self._half_life,
                by_quantiles=key[0] not in _PROBABILITIES,
            )
        return found

    def _tell(self) -> None:
        self._untold = 0
        told = self._promises.figures()
        for key, observed in self._observed.items():
            name = _name(key)
            told[f"exit_threshold{{policy=adaptive,confidence={name}}}"] = observed.adaptive
            for kind in Kind:
                labels = f"{{confidence={name},verdict={kind.name.lower()}}}"
                told[f"policy_samples{labels}"] = observed.counted[kind]
            mixture = observed.mixture
            if mixture is not None and not mixture.fallback:
                for verdict, part, weight in (
                    ("agrees", mixture.agrees, mixture.weight),
                    ("disagrees", mixture.disagrees, 1 - mixture.weight),
                ):
                    labels = f"{{confidence={name},verdict={verdict}}}"
                    told[f"mixture_alpha{labels}"] = part.alpha
                    told[f"mixture_beta{labels}"] = part.beta
                    told[f"mixture_weight{labels}"] = weight
        for key, threshold in self._last_budget.items():
            told[f"exit_threshold{{policy=budget,confidence={_name(key)}}}"] = threshold
        self._figures = told


def most_exits(compute: ComputePolicy) -> float:
    """The largest share of tokens that can be decided at the exit.

    A full stack goes to the deep stage, which then decides one token; in mode ``copy`` none.
    """
    return 1.0 if compute.copies_states else compute.max_stack / (compute.max_stack + 1)


def _key(compute: ComputePolicy) -> _Key:
    # Copied keys and values change what the deep stage says.
    return compute.confidence, compute.exit_temperature, compute.copies_states


def _name(key: _Key) -> str:
    measure, temperature, copies = key
    scaled = "" if temperature == 1 else f"@{temperature!r}"
    return f"{measure.value}{scaled}{'+copy' if copies else ''}"


def _parse(name: str) -> _Key:
    """The inverse of ``_name``."""
    rest, _, copies = name.partition("+")
    measure, _, temperature = rest.partition("@")
    return Confidence(measure), float(temperature or 1), bool(copies)
