"""From the news of a run to the events of a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from typing import Any

from fathom.api.errors import ApiError, as_api_error
from fathom.api.records import News
from fathom.api.responses import Choice, Dialect
from fathom.api.run import Run
from fathom.api.sse import DONE, event, without_ids
from fathom.api.usage import usage_body

_ANOTHER_TIME = (429, 503)
"""Statuses of failures that say nothing of the request: the same may work later."""


class StreamWriter:
    """Makes events, numbered on from those that were sent before.

    Args:
        number: of the last event sent; None numbers none.
        opened: indices of the completions that were opened before.
    """

    def __init__(
        self,
        dialect: Dialect,
        *,
        with_usage: bool,
        number: int | None = None,
        opened: Collection[int] = (),
    ) -> None:
        self._dialect = dialect
        self._with_usage = with_usage
        self._number = number
        self._opened = set(opened)

    async def news(
        self, run: Run, batches: AsyncGenerator[list[Choice], None], first: list[Choice] | None
    ) -> AsyncGenerator[News, None]:
        """Everything that comes of a run, to the end.

        An error after the first token is an event too, and the end of the stream.

        Args:
            first: a batch that was read already.

        Raises:
            ApiError: for a failure that is no part of the stream, which can go on another time.
        """
        closing: list[str] = []
        try:
            async with aclosing(batches):
                if first is not None:
                    yield self._piece(run, first)
                async for batch in batches:
                    yield self._piece(run, batch)
            if self._with_usage:
                usage = usage_body(run.usages)
                closing.append(self._event(self._dialect.envelope([], chunk=True, usage=usage)))
        except Exception as error:
            failure = as_api_error(error)
            if failure.status in _ANOTHER_TIME:
                raise failure from error
            closing.append(self._event(failure.body()))
        yield News((*closing, self._event(DONE)), ended=True)

    def _piece(self, run: Run, batch: list[Choice]) -> News:
        events: list[str] = []
        for choice in batch:
            if choice.index not in self._opened:
                self._opened.add(choice.index)
                opening = self._dialect.opening(choice)
                if opening is not None:
                    events.append(self._chunk(opening))
            if _tells(choice, self._dialect.detailed):
                events.append(self._chunk(self._dialect.delta(choice)))
        return News(tuple(events), tuple(run.progress(choice) for choice in batch))

    def _chunk(self, entry: dict[str, Any]) -> str:
        body = self._dialect.envelope([entry], chunk=True)
        if self._with_usage:
            body["usage"] = None
        return self._event(body)

    def _event(self, data: dict[str, Any] | str) -> str:
        if self._number is not None:
            self._number += 1
        return event(data, self._number)


async def as_events(news: AsyncGenerator[News, None]) -> AsyncGenerator[str, None]:
    """The events of a stream that is kept nowhere, those of a piece together."""
    async with aclosing(news):
        async for piece in news:
            if piece.events:
                yield "".join(piece.events)


async def to_the_end(
    events: AsyncGenerator[str, None], *before: str, ids: bool = True
) -> AsyncGenerator[str, None]:
    """A stream as it goes to the client: what comes first, the events, and perhaps a failure.

    The failure's event has no id: it is not part of the stream, which can be gone on with.

    Args:
        ids: leave the events' ids in.
    """
    try:
        async with aclosing(events):
            if before:
                yield _shown("".join(before), ids)
            async for text in events:
                yield _shown(text, ids)
    except ApiError as error:
        yield event(error.body()) + event(DONE)


def _shown(events: str, ids: bool) -> str:
    return events if ids else without_ids(events)


def _tells(news: Choice, detailed: bool) -> bool:
    """Whether a chunk would say anything: text may be held back while tokens arrive."""
    return bool(news.text) or news.finish_reason is not None or (detailed and bool(news.tokens))
