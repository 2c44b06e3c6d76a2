"""Runs the flushes of many shallow replicas on one deep stage, those that wait together at once."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from fathom.engine.deep import FlushItem, run_flush
from fathom.engine.stage import Stage


@dataclass(frozen=True, slots=True)
class _Job:
    ops: Sequence[tuple[int, int | None]]
    items: Sequence[FlushItem]
    answer: Future[torch.Tensor]

    @property
    def rows(self) -> int:
        return sum(len(item.hidden) for item in self.items)


class DeepWorker:
    """Owns a deep stage's thread.

    Weights and keys are read once for all flushes that wait when a pass begins, whoever sent them.

    Args:
        max_rows: rows of a pass, unless one flush alone has more.
    """

    def __init__(self, stage: Stage, max_rows: int) -> None:
        self._stage = stage
        self._max_rows = max_rows
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._held: _Job | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="fathom-deep", daemon=True)
        self._thread.start()

    def submit(
        self, items: Sequence[FlushItem], ops: Sequence[tuple[int, int | None]] = ()
    ) -> Future[torch.Tensor]:
        """Queue a flush; jobs run in the order in which they came.

        Args:
            items: with blocks of the stage's own pool.
            ops: (target, source) blocks to copy before, or (target, None) to zero.

        Returns:
            the logits, as in ``FlushResult``.
        """
        job = _Job(ops, items, Future())
        if self._closed:
            job.answer.set_exception(RuntimeError("the deep stage is closed"))
        else:
            self._jobs.put(job)
        return job.answer

    def close(self) -> None:
        """End the thread once what is queued is done."""
        self._closed = True
        self._jobs.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while (first := self._next()) is not None:
            jobs, rows = [first], first.rows
            while (more := self._next(wait=False)) is not None:
                if rows + more.rows > self._max_rows:
                    self._held = more
                    break
                jobs.append(more)
                rows += more.rows
            self._run(jobs)

    def _next(self, *, wait: bool = True) -> _Job | None:
        if self._held is not None:
            held, self._held = self._held, None
            return held
        try:
            job = self._jobs.get(block=wait)
        except queue.Empty:
            return None
        if job is None and not wait:
            self._jobs.put(None)  # the end, for the next to find
        return job

    def _run(self, jobs: Sequence[_Job]) -> None:
        try:
            for job in jobs:
                self._prepare(job)
            logits = self._pass([item for job in jobs for item in job.items])
        except Exception as error:
            for job in jobs:
                job.answer.set_exception(error)
            return
        first = 0
        for job in jobs:
            count = sum(item.num_outputs for item in job.items)
            job.answer.set_result(logits[first : first + count])
            first += count

    def _prepare(self, job: _Job) -> None:
        pool = self._stage.pool
        for target, source in job.ops:
            if source is None:
                pool.zero_block(target)
            else:
                pool.copy_block(source, target)

    def _pass(self, items: Sequence[FlushItem]) -> torch.Tensor:
        if not items:
            return torch.empty(0, self._stage.decoder.config.vocab_size)
        return run_flush(self._stage, items)
