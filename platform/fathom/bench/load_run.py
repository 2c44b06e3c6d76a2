"""Load on a server: requests at their times (open loop), so many at once (closed), or both.

Open loop: a request is sent at its time, whatever became of those before, as independent users do.
Closed loop: each of so many users sends the next one when the one before has ended. With both, a
request whose time has come waits for a place, as in vLLM's ``bench serve``.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from fathom.bench.load_client import Answer, ask

_PROBE_S = 0.01


@dataclass(slots=True)
class Load:
    """What a load gave.

    Attributes:
        answers: in the order of the bodies. seconds: from the first request to the last end.
        send_lag_s: by how much each request left after its time, in seconds; waiting for a place
            is not counted.
        loop_lag_s: by how much the generator's event loop was late, sampled while it ran: what it
            may have added to any time that was measured.
        cpu_s: CPU seconds of the generator's process.
        most_at_once: requests.
    """

    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0
    send_lag_s: list[float] = field(default_factory=list)
    loop_lag_s: list[float] = field(default_factory=list)
    cpu_s: float = 0.0
    most_at_once: int = 0


@dataclass(frozen=True, slots=True)
class Target:
    """A server and how to reach it.

    Attributes:
        base_url: without the endpoint's path. endpoint: that path. key: empty for none.
        timeout_s: silence after which a request has failed.
    """

    base_url: str
    endpoint: str
    key: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 600.0

    def client(self) -> httpx.AsyncClient:
        """A client without limits on connections, and without the environment's proxy."""
        headers = {"Content-Type": "application/json", **self.headers}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        return httpx.AsyncClient(
            base_url=self.base_url,
            headers=headers,
            timeout=httpx.Timeout(self.timeout_s, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )


def run_load(
    target: Target,
    bodies: Sequence[Mapping[str, Any]],
    times: Sequence[float] | None,
    *,
    max_concurrency: int | None = None,
    on_end: Callable[[Answer], None] = lambda answer: None,
) -> Load:
    """Send all requests and read all answers.

    Args:
        times: seconds from the start at which each is sent, ascending; None sends each as soon as
            there is a place.
        max_concurrency: places; None for as many as come.
        on_end: called after each.
    """
    return asyncio.run(_run(target, bodies, times, max_concurrency, on_end))


async def _run(
    target: Target,
    bodies: Sequence[Mapping[str, Any]],
    times: Sequence[float] | None,
    max_concurrency: int | None,
    on_end: Callable[[Answer], None],
) -> Load:
    load = Load()
    places = asyncio.Semaphore(max_concurrency or len(bodies) or 1)
    at_once = 0

    async def one(body: Mapping[str, Any], scheduled: float) -> Answer:
        nonlocal at_once
        async with places:
            at_once += 1
            load.most_at_once = max(load.most_at_once, at_once)
            try:
                answer = await ask(client, target.endpoint, body, scheduled)
            finally:
                at_once -= 1
        on_end(answer)
        return answer

    gc.collect()
    gc.disable()  # a collection in the midst would be measured as the server's
    probe = asyncio.create_task(_probe(load.loop_lag_s))
    try:
        async with target.client() as client:
            cpu, start = time.process_time(), time.perf_counter()
            running = []
            for number, body in enumerate(bodies):
                scheduled = start + (times[number] if times is not None else 0.0)
                wait = scheduled - time.perf_counter()
                if wait > 0:
                    await asyncio.sleep(wait)
                if times is not None:
                    load.send_lag_s.append(time.perf_counter() - scheduled)
                running.append(asyncio.create_task(one(body, scheduled)))
            load.answers = await asyncio.gather(*running)
            load.seconds = time.perf_counter() - start
            load.cpu_s = time.process_time() - cpu
    finally:
        probe.cancel()
        gc.enable()
    return load


async def _probe(lags: list[float]) -> None:
    """Sleep again and again, and note how much too long it took."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(_PROBE_S)
        lags.append(max(0.0, time.perf_counter() - before - _PROBE_S))
