"""Joining an engine's outputs into fewer, larger pieces on their way out of a replica."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from fathom.types import RequestOutput


def merge_outputs(outputs: list[RequestOutput]) -> list[RequestOutput]:
    """Join news of the same completion: one output an index, tokens and text in order."""
    merged: dict[int, RequestOutput] = {}
    for out in outputs:
        seen = merged.get(out.index)
        if seen is None:
            merged[out.index] = out
            continue
        merged[out.index] = RequestOutput(
            request_id=out.request_id,
            index=out.index,
            tokens=seen.tokens + out.tokens,
            text=seen.text + out.text,
            finish_reason=out.finish_reason,
            stop_reason=out.stop_reason,
            error=out.error,
            retriable=out.retriable,
            usage=out.usage,
            prompt_tokens=out.prompt_tokens if seen.prompt_tokens is None else seen.prompt_tokens,
        )
    return list(merged.values())


async def coalesce(
    outputs: AsyncIterator[RequestOutput], interval_s: Callable[[], float]
) -> AsyncGenerator[list[RequestOutput], None]:
    """Yield the first output at once, and afterwards at most one list every ``interval_s``.

    A hop between replicas costs about a millisecond an item, whatever its size, so tokens that
    come faster than a reader can use them travel together. The end of a completion never waits.

    Args:
        outputs: an engine's outputs; closed (which cancels the request) when this generator is.
        interval_s: gives the seconds between two lists; 0 only joins what is there already.

    Raises:
        Whatever ``outputs`` raises, after everything that came before it.
    """
    pending: list[RequestOutput] = []
    news = asyncio.Event()
    ended = asyncio.Event()  # a completion ended or the source is done: do not wait any longer

    async def pump() -> None:
        try:
            async for out in outputs:
                pending.append(out)
                news.set()
                if out.finish_reason is not None:
                    ended.set()
        finally:
            news.set()
            ended.set()

    task = asyncio.create_task(pump())
    loop = asyncio.get_running_loop()
    last = -math.inf
    try:
        while True:
            await news.wait()
            wait_s = last + interval_s() - loop.time()
            if wait_s > 0 and not ended.is_set():
                await _wait_at_most(ended, wait_s)
            news.clear()
            ended.clear()
            batch, pending[:] = merge_outputs(pending), []
            if batch:
                last = loop.time()
                yield batch
            if task.done() and not pending:
                task.result()
                return
            if task.done():
                news.set()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        close: Any = getattr(outputs, "aclose", None)
        if close is not None:
            await close()


async def _wait_at_most(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass
