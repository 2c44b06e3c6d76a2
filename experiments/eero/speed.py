"""What a budget saves in time, for the classifier as it is served."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from experiments.eero.tasks import Task, read_data
from fathom.classification import ClassifyJob, ClassifyResult
from fathom.engine.classifier import Classifier
from fathom.models.classifier_files import ClassifierFiles

BUDGETS: tuple[float | None, ...] = (None, 0.75, 0.5, 0.25)
_ROWS, _ROUNDS = 128, 3


@dataclass(frozen=True, slots=True)
class Speed:
    """One budget.

    Attributes:
        seconds: median of a row's, reading included. speedup: median over rounds of a full pass's
            time over this budget's in the same round. flops: spent, over the full model's.
    """

    budget: float | None
    seconds: float
    speedup: float
    flops: float


def measure(task: Task, files: ClassifierFiles) -> list[Speed]:
    """Time requests of 128 held-out rows; budgets take turns, so that all see the same machine."""
    _, heldout = read_data(task, seed=0)
    inputs = tuple(heldout.inputs[:_ROWS])
    classifier = Classifier(files)
    took: dict[float | None, list[float]] = {budget: [] for budget in BUDGETS}
    flops: dict[float | None, float] = {}
    for turn in range(_ROUNDS + 1):
        for budget in BUDGETS:
            start = time.perf_counter()
            (result,) = classifier.run([ClassifyJob(inputs=inputs, budget=budget)])
            seconds = (time.perf_counter() - start) / len(inputs)
            if isinstance(result, ClassifyResult) and turn:  # the first turn warms up
                took[budget].append(seconds)
                flops[budget] = result.flops / result.full_flops
    return [
        Speed(
            budget,
            statistics.median(took[budget]),
            statistics.median(f / s for f, s in zip(took[None], took[budget], strict=True)),
            flops[budget],
        )
        for budget in BUDGETS
    ]
