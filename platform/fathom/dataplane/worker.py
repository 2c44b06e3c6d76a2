"""Runs the flushes of many shallow replicas on one deep stage, those that wait together at once."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from fathom.engine.deep import FlushItem, FlushResult, run_flush
from fathom.engine.stage import Stage

_SMOOTHING = 0.1
"""Weight of the newest flush in the smoothed figures."""

_IDLE_S = 2.0
"""Without a flush for this long nobody waits, whatever the last one did."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a flush came to: its result, seconds of its pass, and seconds that it waited for it."""

    result: FlushResult
    pass_s: float
    queue_s: float


@dataclass(frozen=True, slots=True)
class _Job:
    prepare: Callable[[], None]
    items: Sequence[FlushItem]
    answer: Future[Work]
    since: float = field(default_factory=time.perf_counter)

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
        self.stage = stage
        self._max_rows = max_rows
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._held: _Job | None = None
        self._closed = False
        self._passes = self._rows = 0
        self._queue_s = self._pass_s = self._latest = 0.0
        self._thread = threading.Thread(target=self._loop, name="fathom-deep", daemon=True)
        self._thread.start()

    def submit(
        self, items: Sequence[FlushItem], prepare: Callable[[], None] = lambda: None
    ) -> Future[Work]:
        """Queue a flush; jobs run in the order in which they came.

        Args:
            items: with blocks of the stage's own pool.
            prepare: called on the stage's thread before the rows are run.
        """
        job = _Job(prepare, items, Future())
        if self._closed:
            job.answer.set_exception(RuntimeError("the deep stage is closed"))
        else:
            self._jobs.put(job)
        return job.answer

    def stats(self) -> dict[str, float]:
        """Figures since the start; seconds are smoothed over the latest flushes."""
        idle = time.perf_counter() - self._latest > _IDLE_S
        return {
            "deep_passes": self._passes,
            "deep_rows": self._rows / max(self._passes, 1),
            "deep_pass_seconds": self._pass_s,
            "flush_queue_seconds": 0.0 if idle else self._queue_s,
            "flushes_waiting": self._jobs.qsize(),
        }

    @property
    def is_alive(self) -> bool:
        """Whether flushes are being answered."""
        return self._thread.is_alive()

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
        start = time.perf_counter()
        try:
            for job in jobs:
                job.prepare()
            items = [item for job in jobs for item in job.items]
            result = run_flush(self.stage, items)
        except Exception as error:
            for job in jobs:
                job.answer.set_exception(error)
            return
        pass_s = time.perf_counter() - start
        if items:
            self._note(jobs, start, pass_s)
        first = first_logits = 0
        for job in jobs:
            outputs = sum(item.num_outputs for item in job.items)
            logits = sum(item.num_logits for item in job.items)
            own = result
            if len(jobs) > 1:
                own = result.part(first, outputs, first_logits, logits)
            job.answer.set_result(Work(own, pass_s, start - job.since))
            first += outputs
            first_logits += logits

    def _note(self, jobs: Sequence[_Job], start: float, pass_s: float) -> None:
        if start - self._latest > _IDLE_S:
            self._queue_s = 0.0
        self._latest = time.perf_counter()
        self._passes += 1
        self._rows += sum(job.rows for job in jobs)
        self._pass_s += _SMOOTHING * (pass_s - self._pass_s)
        for job in jobs:
            if job.items:
                self._queue_s += _SMOOTHING * (start - job.since - self._queue_s)
