"""One live stream at its ingress: all its news, how far they are written, how far they may go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from fathom.api.journal import Entry
from fathom.api.records import News, Plan


class StreamLog:
    """All news of a stream, those of its former servers included.

    Attributes:
        news: in order. written: how many the journal has; free: how many may go out.
        known_to: incarnation of the journal that has the stream; empty if it must be written
            whole.
        given_up: it goes on without the journal. taken_over: another connection goes on with it.
        is_complete: nothing more comes.
    """

    def __init__(
        self, plan: Plan, epoch: int, news: Sequence[News] = (), *, known_to: str = ""
    ) -> None:
        self.plan = plan
        self.epoch = epoch
        self.news = list(news)
        self.written = self.free = len(news)
        self.known_to = known_to
        self.given_up = False
        self.taken_over = False
        self._sent = len(news)
        self.is_complete = False
        self._failure: Exception | None = None
        self._changed = asyncio.Event()

    def entry(self) -> Entry:
        """What the journal has not been told, or the whole stream where it must be."""
        start = self.written if self.known_to else 0
        plan = None if self.known_to else self.plan
        return Entry(self.plan.key, self.epoch, start, tuple(self.news[start:]), plan)

    def release(self, count: int) -> None:
        """Let the first ``count`` pieces of news go out."""
        self.free = max(self.free, count)
        self._changed.set()

    def end(self, failure: Exception | None = None) -> None:
        """Nothing more comes; with a failure that is no part of the stream, or without."""
        self.is_complete = True
        self._failure = self._failure or failure
        self._changed.set()

    async def released(self) -> AsyncGenerator[str, None]:
        """The events as they may go out, those of several pieces together.

        Raises:
            The failure of ``end``, after everything that may go out before it.
        """
        while True:
            await self._changed.wait()
            self._changed.clear()
            news = self.news[self._sent : self.free]
            self._sent = max(self._sent, self.free)
            text = "".join(event for piece in news for event in piece.events)
            if text:
                yield text
            if self.is_complete and (self.taken_over or self._sent == len(self.news)):
                if self._failure is not None:
                    raise self._failure
                return
