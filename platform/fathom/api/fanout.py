"""Several streams as one: the prompts of one completion request run side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")


async def interleave(
    streams: Sequence[AsyncIterator[Item]],
) -> AsyncGenerator[tuple[int, Item], None]:
    """Yield (position of the stream, item) in order of arrival.

    Raises:
        The first error of any stream; the others are closed, as they are when this generator is.
    """
    if len(streams) == 1:
        try:
            async for item in streams[0]:
                yield 0, item
        finally:
            await _close(streams[0])
        return

    queue: asyncio.Queue[tuple[int, Item | BaseException | None]] = asyncio.Queue()

    async def pump(position: int, stream: AsyncIterator[Item]) -> None:
        try:
            async for item in stream:
                queue.put_nowait((position, item))
        except Exception as error:  # handed to the reader, who raises it
            queue.put_nowait((position, error))
        else:
            queue.put_nowait((position, None))
        finally:
            await _close(stream)

    tasks = [asyncio.create_task(pump(i, stream)) for i, stream in enumerate(streams)]
    try:
        running = len(streams)
        while running:
            position, news = await queue.get()
            if isinstance(news, BaseException):
                raise news
            if news is None:
                running -= 1
            else:
                yield position, news
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _close(stream: AsyncIterator[Any]) -> None:
    close = getattr(stream, "aclose", None)
    if close is not None:
        await close()
