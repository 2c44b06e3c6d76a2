"""A request whose replicas are lost, over real engines: its caller sees no gap and no duplicate."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.api.backend import BackendUnavailable
from fathom.api.local import LocalBackend
from fathom.api.resume import Attempt, ReplicaLost, resuming
from fathom.config import EngineConfig
from fathom.engine.async_engine import AsyncEngine
from fathom.types import (
    AcceptMode,
    ComputePolicy,
    FinishReason,
    InvalidRequest,
    PolicyName,
    Request,
    RequestOutput,
    SamplingParams,
)

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def engines(engine: AsyncEngine, tiny_model: Path) -> list[AsyncEngine]:
    """Two replicas."""
    config = EngineConfig(
        model=str(tiny_model),
        dtype="float32",
        threads=1,
        kv_cache_bytes=4 << 20,
        pause_drafting=False,  # depths must not depend on speed
        exit_layer=2,
        adapter="none",
    )
    return [engine, AsyncEngine.from_config(config)]


def request(compute: ComputePolicy | None = None, n: int = 1, **sampling: Any) -> Request:
    return Request(
        request_id=f"r{next(NUMBERS)}",  # those of earlier tests may not have ended yet
        prompt_token_ids=tuple(b"Once upon a time"),
        sampling=SamplingParams(**{"max_tokens": 24, "ignore_eos": True, **sampling}),
        compute=compute or ComputePolicy(mode=AcceptMode.FULL),
        n=n,
        timeout_s=60,
    )


class Replicas:
    """Backends that are lost one after another, each after some of its batches."""

    def __init__(self, engines: list[AsyncEngine], batches: list[int]) -> None:
        self._engines, self._left = engines, list(batches)
        self.asked: list[Request] = []
        self.closed = 0

    async def attempt(self, item: Request) -> AsyncGenerator[list[RequestOutput], None]:
        left = self._left.pop(0) if self._left else None
        backend = LocalBackend(self._engines[len(self.asked) % 2], interval_s=0.0)
        self.asked.append(item)
        try:
            async with aclosing(backend.generate(item)) as batches:
                async for batch in batches:
                    if left == 0:
                        raise ReplicaLost("killed")
                    left = None if left is None else left - 1
                    yield batch
        finally:
            self.closed += 1


def story(batches: list[list[RequestOutput]], n: int) -> list[tuple[Any, ...]]:
    """What the caller saw of each completion."""
    told = []
    for index in range(n):
        outputs = [out for batch in batches for out in batch if out.index == index]
        assert len({out.request_id for out in outputs}) == 1
        assert [out.finish_reason is None for out in outputs[:-1]] == [True] * (len(outputs) - 1)
        last = outputs[-1]
        told.append(
            (
                [(token.id, token.depth) for out in outputs for token in out.tokens],
                "".join(out.text for out in outputs),
                last.finish_reason,
                last.stop_reason,
                last.usage.completion_tokens,
                last.usage.compute.decided,
            )
        )
    return told


def run(item: Request, attempt: Attempt, **options: Any) -> list[list[RequestOutput]]:
    async def main() -> list[list[RequestOutput]]:
        async with asyncio.timeout(60):
            return [batch async for batch in resuming(item, attempt, **options)]

    return asyncio.run(main())


@settings(max_examples=25, deadline=None)
@given(
    compute=st.builds(
        ComputePolicy,
        mode=st.sampled_from(list(AcceptMode)),
        policy=st.just(PolicyName.FORCED),
        forced_exit_rate=st.floats(0, 1),
        max_stack=st.integers(1, 5),
    ),
    n=st.integers(1, 3),
    temperature=st.sampled_from([0.0, 1.2]),
    stop=st.sampled_from([(), ("e",), ("\ufffd\ufffd\ufffd",)]),
    losses=st.lists(st.integers(0, 8), max_size=4),
)
def test_however_often_its_replica_is_lost(engines, compute, n, temperature, stop, losses):
    item = request(compute, n, temperature=temperature, stop=stop, seed=5)
    whole = story(run(item, Replicas(engines, []).attempt), n)
    replicas, counted = Replicas(engines, losses), []
    batches = run(item, replicas.attempt, on_resumption=lambda: counted.append(1))
    assert story(batches, n) == whole
    assert replicas.closed == len(replicas.asked)
    usages = [out.usage for batch in batches for out in batch if out.usage]
    assert max(usage.compute.resumptions for usage in usages) <= len(counted) <= len(losses)


def test_a_request_without_a_seed_gets_one(engines):
    replicas = Replicas(engines, [3, 2])
    run(request(temperature=1.5), replicas.attempt)
    assert len(replicas.asked) == 3
    seeds = {item.sampling.seed for item in replicas.asked}
    assert len(seeds) == 1 and None not in seeds
    assert len({item.request_id for item in replicas.asked}) == 3  # the lost ones may still run


def test_the_rest_has_the_rest_of_the_time_and_the_usage_counts(engines):
    replicas = Replicas(engines, [2, 0, 3])
    batches = run(request(), replicas.attempt)
    left = [item.timeout_s for item in replicas.asked]
    assert left == sorted(left, reverse=True) and len(set(left)) == 4 and left[0] == 60
    # The second gave nothing: the request went on at the third and the fourth.
    assert batches[-1][-1].usage.compute.resumptions == 2
    assert batches[-1][-1].usage.completion_tokens == 24


def plight(
    engines: list[AsyncEngine], **changes: Any
) -> Callable[[Request], AsyncGenerator[list[RequestOutput], None]]:
    """An attempt that ends at its first replica with an engine's error after five batches."""
    asked = []

    async def attempt(item: Request) -> AsyncGenerator[list[RequestOutput], None]:
        asked.append(item)
        count = 0
        async with aclosing(LocalBackend(engines[0], interval_s=0.0).generate(item)) as batches:
            async for batch in batches:
                count += 1
                if len(asked) == 1 and count == 5:
                    end = {"finish_reason": FinishReason.ERROR, "error": "no deep stage is left"}
                    yield [dataclasses.replace(out, **end, **changes) for out in batch]
                    return
                yield batch

    return attempt


def test_an_engine_without_a_deep_stage_is_left_for_another(engines):
    whole = story(run(request(), Replicas(engines, []).attempt), 1)
    assert story(run(request(), plight(engines, retriable=True)), 1) == whole


def test_other_errors_are_the_requests_own(engines):
    batches = run(request(), plight(engines))
    assert batches[-1][0].finish_reason is FinishReason.ERROR


def test_a_stream_that_ends_early_is_a_loss(engines):
    whole = story(run(request(), Replicas(engines, []).attempt), 1)
    asked = []

    async def attempt(item: Request) -> AsyncGenerator[list[RequestOutput], None]:
        asked.append(item)
        async with aclosing(LocalBackend(engines[0], interval_s=0.0).generate(item)) as batches:
            async for batch in batches:
                if len(asked) < 3 and batch[0].finish_reason:
                    return
                yield batch

    assert story(run(request(), attempt), 1) == whole
    assert len(asked) == 3


def test_when_nothing_is_left_it_says_so(engines):
    async def gone(item: Request) -> AsyncGenerator[list[RequestOutput], None]:
        raise ReplicaLost("The actor died")
        yield []

    message = r"lost \(The actor died\) after 0 tokens, and none went on with it within 0.3 s"
    with pytest.raises(BackendUnavailable, match=message):
        run(request(), gone, give_up_s=0.3)
    hurried = dataclasses.replace(request(), timeout_s=0.2)
    with pytest.raises(BackendUnavailable, match=r"within the 0\.2 s that it had"):
        run(hurried, gone)


def test_a_replica_that_never_answers_after_a_loss(engines):
    """Serve keeps a call waiting as long as there is no replica."""
    replicas = Replicas(engines, [4])
    cancelled = []

    async def attempt(item: Request) -> AsyncGenerator[list[RequestOutput], None]:
        if replicas.asked:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                cancelled.append(item)
                raise
        async with aclosing(replicas.attempt(item)) as batches:
            async for batch in batches:
                yield batch

    with pytest.raises(BackendUnavailable, match=r"lost \(killed\) after \d+ tokens"):
        run(request(), attempt, give_up_s=0.3)
    assert len(cancelled) == 1


def test_a_refusal_is_the_callers_only_at_first(engines):
    async def refuse(item: Request) -> AsyncGenerator[list[RequestOutput], None]:
        raise InvalidRequest("max_stack must be smaller.", param="max_stack")
        yield []

    with pytest.raises(InvalidRequest):
        run(request(), refuse)
    replicas = Replicas(engines, [4])

    def attempt(item: Request) -> AsyncGenerator[list[RequestOutput], None]:
        return (refuse if replicas.asked else replicas.attempt)(item)

    with pytest.raises(BackendUnavailable, match="another one refuses to go on: max_stack"):
        run(request(), attempt)
