"""Coalescing, fan-out, and what happens when a reader goes away; over plain generators."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from fathom.api.coalesce import coalesce, merge_outputs
from fathom.api.fanout import interleave
from fathom.types import FinishReason, RequestOutput, Token, Usage


def out(text: str, index: int = 0, end: FinishReason | None = None) -> RequestOutput:
    return RequestOutput(
        request_id="r",
        index=index,
        tokens=[Token(id=ord(char), depth=1) for char in text],
        text=text,
        finish_reason=end,
        usage=Usage() if end else None,
    )


def test_merge_keeps_order_and_the_end() -> None:
    merged = merge_outputs([out("a"), out("x", 1), out("b"), out("c", end=FinishReason.STOP)])
    assert [(o.index, o.text, o.finish_reason) for o in merged] == [
        (0, "abc", FinishReason.STOP),
        (1, "x", None),
    ]
    assert [token.id for token in merged[0].tokens] == [97, 98, 99]
    assert merged[0].usage is not None


async def source(gap_s: float, log: list[str], count: int = 20) -> AsyncIterator[RequestOutput]:
    try:
        for i in range(count):
            end = FinishReason.LENGTH if i == count - 1 else None
            yield out(chr(97 + i), end=end)
            await asyncio.sleep(gap_s)
        log.append("done")
    finally:
        log.append("closed")


def test_first_at_once_then_together() -> None:
    async def run() -> tuple[list[str], list[float]]:
        texts, times = [], []
        start = time.perf_counter()
        async for batch in coalesce(source(0.01, []), lambda: 0.1):
            texts.append("".join(o.text for o in batch))
            times.append(time.perf_counter() - start)
        return texts, times

    texts, times = asyncio.run(run())
    assert "".join(texts) == "abcdefghijklmnopqrst"
    assert texts[0] == "a"
    assert times[0] < 0.05
    assert 3 <= len(texts) <= 6  # 0.2 s of tokens in steps of 0.1 s
    # The end does not wait for the interval.
    assert times[-1] - times[-2] < 0.1


def test_no_interval_passes_everything_on() -> None:
    async def run() -> list[str]:
        return ["".join(o.text for o in b) async for b in coalesce(source(0.002, []), lambda: 0.0)]

    texts = asyncio.run(run())
    assert "".join(texts) == "abcdefghijklmnopqrst"
    assert len(texts) > 10


@pytest.mark.parametrize("interval_s", [0.0, 0.05])
def test_closing_closes_the_source(interval_s: float) -> None:
    log: list[str] = []

    async def run() -> None:
        async with aclosing(coalesce(source(0.01, log), lambda: interval_s)) as batches:
            async for _ in batches:
                break
        assert log == ["closed"]

    asyncio.run(run())


def test_cancelling_the_reader_closes_the_source() -> None:
    log: list[str] = []

    async def read() -> None:
        async for _ in coalesce(source(10, log), lambda: 0.01):
            pass

    async def run() -> None:
        task = asyncio.create_task(read())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert log == ["closed"]

    asyncio.run(run())


def test_an_error_comes_after_what_was_before_it() -> None:
    async def failing() -> AsyncIterator[RequestOutput]:
        yield out("a")
        yield out("b")
        raise RuntimeError("broken")

    seen: list[str] = []

    async def run() -> None:
        async for batch in coalesce(failing(), lambda: 0.5):
            seen.extend(o.text for o in batch)

    start = time.perf_counter()
    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(run())
    assert "".join(seen) == "ab"
    assert time.perf_counter() - start < 0.4


async def numbers(values: list[int], gap_s: float, log: list[str]) -> AsyncIterator[int]:
    try:
        for value in values:
            await asyncio.sleep(gap_s)
            if value < 0:
                raise RuntimeError("negative")
            yield value
    finally:
        log.append("closed")


def test_interleave_serves_all_streams_in_order() -> None:
    async def run() -> list[tuple[int, int]]:
        streams = [numbers([1, 2, 3], 0.01, []), numbers([], 0, []), numbers([7, 8], 0.015, [])]
        return [pair async for pair in interleave(streams)]

    pairs = asyncio.run(run())
    assert [v for i, v in pairs if i == 0] == [1, 2, 3]
    assert [v for i, v in pairs if i == 2] == [7, 8]
    assert [i for i, _ in pairs] != sorted(i for i, _ in pairs)


@pytest.mark.parametrize("count", [1, 3])
def test_interleave_closes_all_streams(count: int) -> None:
    log: list[str] = []

    async def leave() -> None:
        streams = [numbers([1, 2], 0.01, log) for _ in range(count)]
        async with aclosing(interleave(streams)) as pairs:
            async for _ in pairs:
                break

    asyncio.run(leave())
    # A stream whose first step had not begun has nothing to close.
    assert 1 <= len(log) <= count


def test_interleave_raises_the_first_error_and_closes_the_rest() -> None:
    log: list[str] = []

    async def run() -> None:
        streams = [numbers([1, -1], 0.01, log), numbers([5] * 100, 0.01, log)]
        async for _ in interleave(streams):
            pass

    with pytest.raises(RuntimeError, match="negative"):
        asyncio.run(run())
    assert log == ["closed", "closed"]
