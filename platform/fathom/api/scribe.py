"""Writing ahead: the news of all live streams go to the journal together, and then to the clients.

One call at a time, so that calls set their own pace: while one is away, news gather for the next.
A journal that does not answer holds nobody up. Streams go on without it, and are written whole
once it is back.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from fathom.api.errors import stream_taken_over
from fathom.api.journal import (
    Answer,
    Entry,
    Journal,
    JournalLost,
    NotTaken,
    Taken,
    Verdict,
    new_epoch,
)
from fathom.api.records import News, Plan, StreamKey
from fathom.api.streamlog import StreamLog

logger = logging.getLogger("fathom.api")

MAX_CALL_BYTES = 8 << 20
"""Of the news in one call, about; what is above goes with the next."""
_PATIENT_TRIES = 8


class Scribe:
    """Writes for all streams of one ingress. Belongs to one event loop.

    Args:
        keep_s: see ``MemoryJournal``; live streams are mentioned often enough to be kept.
        interval_s: between two calls; a stream's first news wait for none.
        patience_s: for an answer, before streams go on without the journal.
        on_loss: called when the journal stops answering.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        keep_s: float,
        interval_s: float = 0.01,
        patience_s: float = 0.5,
        on_loss: Callable[[], None] = lambda: None,
    ) -> None:
        self._journal = journal
        self._beat_s = keep_s / 3
        self._interval_s = interval_s
        self._patience_s = patience_s
        self._on_loss = on_loss
        self._logs: dict[StreamLog, None] = {}
        self._due: dict[StreamLog, None] = {}  # in order of their news
        self._urgent = asyncio.Event()
        self._wake = asyncio.Event()
        self._up = True
        self._last_beat = time.monotonic()
        self._avoid_until = 0.0
        self._task: asyncio.Task[None] | None = None

    async def take(
        self, key: StreamKey, *, after: int, body: bytes | None, patient: bool
    ) -> Taken | NotTaken:
        """See ``Journal.take``.

        Args:
            patient: try for some seconds. Otherwise once, and not at all so soon after the journal
                did not answer.

        Raises:
            JournalLost: if it did not answer.
        """
        if not patient and time.monotonic() < self._avoid_until:
            raise JournalLost("the journal did not answer a moment ago")
        for attempt in range(_PATIENT_TRIES if patient else 1):
            if attempt:
                await asyncio.sleep(self._patience_s)
            try:
                async with asyncio.timeout(self._patience_s):
                    return await self._journal.take(key, after=after, body=body)
            except (JournalLost, TimeoutError):
                self._avoid_until = time.monotonic() + 2 * self._patience_s
        raise JournalLost(f"the journal did not answer within {self._patience_s:g} s")

    async def write(
        self, pieces: AsyncGenerator[News, None], plan: Plan, taken: Taken | None = None
    ) -> AsyncGenerator[str, None]:
        """Run a stream: take its news, write them, and yield its events as they may go out.

        Args:
            taken: where it goes on with what is written already, whose events are not repeated.

        Raises:
            ApiError: if another connection took the stream over, or ``pieces`` failed.
        """
        if taken is None:
            log = StreamLog(plan, new_epoch())
        else:
            log = StreamLog(plan, taken.epoch, taken.news, known_to=taken.incarnation)
        self._logs[log] = None
        pump = asyncio.create_task(self._pump(pieces, log))
        try:
            async with aclosing(log.released()) as events:
                async for text in events:
                    yield text
        finally:
            self._logs.pop(log, None)
            self._due.pop(log, None)
            self._wake.set()
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)

    async def _pump(self, pieces: AsyncGenerator[News, None], log: StreamLog) -> None:
        failure: Exception | None = None
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    log.news.append(piece)
                    if log.given_up or not self._up:
                        log.release(len(log.news))
                    if not log.given_up:
                        self._is_due(log, urgent=not log.free)
        except Exception as error:
            failure = error
        log.end(failure)

    def _is_due(self, log: StreamLog, *, urgent: bool = False) -> None:
        self._due[log] = None
        self._wake.set()
        if urgent:
            self._urgent.set()
        if self._task is None or self._task.done():
            # In a context of its own: the end of the request that happens to be the first must not
            # take its calls along.
            self._task = asyncio.get_running_loop().create_task(
                self._run(), context=contextvars.Context()
            )

    async def _run(self) -> None:
        """Write as long as there are live streams."""
        while self._logs:
            await _within(self._wake, self._last_beat + self._beat_s - time.monotonic())
            self._wake.clear()
            if time.monotonic() >= self._last_beat + self._beat_s:
                self._last_beat = time.monotonic()
                self._due.update(self._logs)
            # One that does not answer is only asked whether it does: what it has not read yet would
            # pile up.
            entries = self._entries() if self._up else []
            if entries or not self._up:
                await self._append(entries)
            if self._due:
                self._wake.set()
            if self._up:
                await _within(self._urgent, self._interval_s)
            else:
                await asyncio.sleep(self._patience_s)
            self._urgent.clear()

    def _entries(self) -> list[tuple[StreamLog, Entry]]:
        """What is due, oldest first, up to the size of a call."""
        entries: list[tuple[StreamLog, Entry]] = []
        nbytes = 0
        while self._due and nbytes < MAX_CALL_BYTES:
            log = next(iter(self._due))
            del self._due[log]
            if log.given_up or log.taken_over:
                continue
            entry = log.entry()
            nbytes += sum(piece.nbytes for piece in entry.news)
            entries.append((log, entry))
        return entries

    async def _append(self, written: list[tuple[StreamLog, Entry]]) -> None:
        try:
            async with asyncio.timeout(self._patience_s):
                answer = await self._journal.append([entry for _, entry in written])
        except Exception as error:  # whatever it is, the streams go on
            self._lose(error)
            return
        if not self._up:
            logger.warning("The journal of streams answers again.")
            self._up = True
            self._due.update(self._logs)
        for (log, entry), verdict in zip(written, answer.verdicts, strict=True):
            self._settle(log, entry, verdict, answer)

    def _lose(self, error: Exception) -> None:
        if self._up:
            logger.warning(
                "The journal of streams does not answer (%r): streams go on, but a client whose "
                "connection breaks now may not get the rest of its stream.",
                error,
            )
            self._on_loss()
        self._up = False
        self._avoid_until = time.monotonic() + 2 * self._patience_s
        for log in self._logs:
            log.known_to = ""  # nobody knows whether the last entries were written
            log.release(len(log.news))
        self._due.update(self._logs)

    def _settle(self, log: StreamLog, entry: Entry, verdict: Verdict, answer: Answer) -> None:
        match verdict:
            case Verdict.KEPT:
                log.known_to = answer.incarnation
                log.written = entry.start + len(entry.news)
                log.release(log.written)
            case Verdict.TAKEN:
                log.taken_over = True
                log.end(stream_taken_over())
            case Verdict.UNKNOWN if entry.plan is None and log.known_to != answer.incarnation:
                log.known_to = ""  # it restarted, and forgot everything
                if log in self._logs:
                    self._is_due(log)
            case Verdict.UNKNOWN:
                # It was there and has gone, or does not fit: the journal has no room for it.
                log.given_up = True
                log.release(len(log.news))


async def _within(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event, but not longer than that."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
