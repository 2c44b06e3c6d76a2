"""A classifier at work: reads inputs, runs the rows of many requests together, keeps the account.

Each request may name a budget, and the rows of requests with different budgets share a batch: a row
carries its own thresholds. They are worked out from the calibration set that the classifier's
folder keeps when a budget is first asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fathom.checks import InvalidRequest
from fathom.classification import Classified, ClassifierInfo, ClassifyJob, ClassifyResult
from fathom.exits.budget import FittedExits, fit_exits
from fathom.models.classifier_files import ClassifierFiles, confidence_of, read_classifier
from fathom.models.inputs import InputError, Rows

MAX_ROWS = 64
"""Of one pass."""
_BUDGETS = 1024


class Classifier:
    """Serves one classifier in this process; not thread-safe.

    Attributes:
        info: what clients may know of it.
    """

    def __init__(self, files: ClassifierFiles) -> None:
        self._files = files
        self._model = files.model
        self._reader: Any = files.reader()
        flops = self._model.cumulative_flops(files.calibration.sizes).mean(axis=0)
        self._costs: NDArray[np.float64] = flops / flops[-1]
        self.info = ClassifierInfo(
            name=files.name,
            labels=files.labels,
            takes=files.takes,
            costs=tuple(self._costs.tolist()),
            calibration_rows=len(files.calibration.labels),
        )
        self._fitted = lru_cache(_BUDGETS)(self._fit)

    @staticmethod
    def from_directory(folder: Path) -> Classifier:
        """Read a classifier's folder.

        Raises:
            ModelError: see ``read_classifier``.
        """
        return Classifier(read_classifier(folder))

    def thresholds(self, budget: float | None) -> tuple[float, ...]:
        """A row leaves at the first head m whose confidence is at least threshold m.

        Args:
            budget: see ``ClassifyJob``.

        Returns:
            M numbers; the last one is 0, for everybody leaves there.

        Raises:
            InvalidRequest: for a budget that is no share, or below the first head's cost.
        """
        if budget is None:
            return (*(float("inf"),) * (len(self._costs) - 1), 0.0)
        smallest = self.info.costs[0]
        if not smallest <= budget <= 1:
            raise InvalidRequest(
                f"compute.budget must be from {smallest:.4g}, which the first of "
                f"{len(self._costs)} exit heads costs, to 1, got {budget!r}.",
                param="compute.budget",
            )
        return self._fitted(budget).thresholds

    def _fit(self, budget: float) -> FittedExits:
        c = self._files.calibration
        return fit_exits(c.confidence, c.correct, self._costs, budget, spend=True)

    def run(self, jobs: Sequence[ClassifyJob]) -> list[ClassifyResult | InvalidRequest]:
        """Classify the inputs of several requests together.

        Returns:
            for each request its result, or what is wrong with it, which harms no other.
        """
        out: list[ClassifyResult | InvalidRequest | None] = [None] * len(jobs)
        reads: dict[int, Rows] = {}
        wanted: dict[int, tuple[float, ...]] = {}
        for number, job in enumerate(jobs):
            try:
                wanted[number] = self.thresholds(job.budget)
                reads[number] = self._read(job)
            except InvalidRequest as error:
                out[number] = error
        places = [(number, row) for number, rows in reads.items() for row in range(len(rows))]
        # Rows of about one size together: less padding.
        places.sort(key=lambda place: int(reads[place[0]].sizes[place[1]]))
        answers: dict[tuple[int, int], Classified] = {}
        for start in range(0, len(places), MAX_ROWS):
            chosen = places[start : start + MAX_ROWS]
            answers.update(zip(chosen, self._pass(chosen, reads, wanted), strict=True))
        for number, rows in reads.items():
            found = tuple(answers[number, row] for row in range(len(rows)))
            out[number] = self._account(jobs[number], found)
        return [result for result in out if result is not None]

    def _read(self, job: ClassifyJob) -> Rows:
        if not job.inputs:
            raise InvalidRequest("input must hold at least one input, got none.", param="input")
        for place, content in enumerate(job.inputs):
            if isinstance(content, str) != (self.info.takes == "text"):
                raise InvalidRequest(
                    f"input[{place}] must be of {self.info.takes}, got {type(content).__name__}.",
                    param=f"input[{place}]",
                )
        try:
            rows: Rows = self._reader.read(job.inputs)
        except InputError as error:
            raise InvalidRequest(f"input: {error}", param="input") from error
        return rows

    def _pass(
        self,
        chosen: Sequence[tuple[int, int]],
        reads: dict[int, Rows],
        wanted: dict[int, tuple[float, ...]],
    ) -> list[Classified]:
        """One batch: rows (request, row of it), each by the thresholds of its request."""
        thresholds = torch.tensor([wanted[number] for number, _ in chosen], dtype=torch.float64)
        parts = [reads[number].batch([row])[0] for number, row in chosen]
        sizes = torch.tensor([int(reads[number].sizes[row]) for number, row in chosen])
        inputs = (
            torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
            if self.info.takes == "text"
            else torch.stack(parts)
        )

        def decide(head: int, rows: Tensor, logits: Tensor) -> Tensor:
            return confidence_of(logits)[0] >= thresholds[rows, head]

        heads, logits = self._model.cascade(inputs, sizes, decide)
        probs = logits.softmax(-1)
        return [
            Classified(int(row.argmax()), tuple(row.tolist()), int(head) + 1, int(size))
            for row, head, size in zip(probs, heads, sizes, strict=True)
        ]

    def _account(self, job: ClassifyJob, rows: tuple[Classified, ...]) -> ClassifyResult:
        """The request's page of the ledger."""
        heads = np.array([row.head - 1 for row in rows])
        flops = self._model.cumulative_flops(np.array([row.tokens for row in rows]))
        return ClassifyResult(
            rows=rows,
            requested_budget=job.budget,
            planned_budget=1.0 if job.budget is None else self._fitted(job.budget).cost,
            realised_budget=float(self._costs[heads].mean()),
            flops=float(flops[np.arange(len(rows)), heads].sum()),
            full_flops=float(flops[:, -1].sum()),
        )
