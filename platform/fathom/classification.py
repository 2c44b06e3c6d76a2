"""The vocabulary of classification: what is asked, and what comes back.

Like ``fathom.types``, these cross every border, so they hold plain Python values only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierInfo:
    """What clients may know of a classifier.

    Attributes:
        name: of the model. labels: of its K classes. takes: ``text`` or ``image``.
        costs: B_1 < ... < B_M = 1, the mean cost of having been seen by head m, as a share of the
            full model's. calibration_rows: from which thresholds are worked out.
    """

    name: str
    labels: tuple[str, ...]
    takes: str
    costs: tuple[float, ...]
    calibration_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyJob:
    """One request.

    Attributes:
        inputs: texts, or the contents of image files; at least one.
        budget: the mean share of the full model's compute that a row may cost; None runs every
            row to the last head.
    """

    inputs: tuple[str | bytes, ...]
    budget: float | None = None


@dataclass(frozen=True, slots=True)
class Classified:
    """The answer for one input.

    Attributes:
        label: index of the most probable class. probs: of all K classes. head: that answered,
            from 1. tokens: that the row had (1 for an image).
    """

    label: int
    probs: tuple[float, ...]
    head: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifyResult:
    """The answers of one request, with its page of the ledger.

    Attributes:
        rows: one for each input, in order.
        requested_budget: of the request. planned_budget: the mean cost that its thresholds have on
            the calibration rows; below what was asked for where more compute would not help.
        realised_budget: the mean of its rows' costs, in the costs of ``ClassifierInfo``; a request
            of few rows can be far from the plan, which holds in the mean over many.
        flops: floating-point operations of its rows. full_flops: what the same rows would have
            cost at full depth.
    """

    rows: tuple[Classified, ...]
    requested_budget: float | None
    planned_budget: float
    realised_budget: float
    flops: float
    full_flops: float
