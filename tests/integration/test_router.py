"""The router in a real Serve: prefixes and sessions stay where they were, load is spread."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator

import pytest
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from deployments.router import ROUTER
from fathom.types import Request, Resumed
from tests.ray_fixtures import TestServer

REPLICAS = 3
SLACK = 4
STEP = 16
SESSIONS = [f"session {number}" for number in range(24)]


class Echo:
    """Says who it is, and stays busy for as many seconds as a request allows."""

    async def generate(self, request: Request) -> AsyncGenerator[str, None]:
        if request.request_id == "die":
            os._exit(1)
        yield self.report()
        await asyncio.sleep(request.timeout_s or 0)

    def report(self) -> str:
        return serve.get_replica_context().replica_id.unique_id


class Front:
    """Another process with a handle, and so with a router."""

    def __init__(self, echo: DeploymentHandle) -> None:
        self._echo = echo.options(stream=True)

    async def generate(self, request: Request) -> AsyncGenerator[str, None]:
        async for answer in self._echo.generate.remote(request):
            yield answer


@pytest.fixture(scope="module")
def front(server: TestServer) -> Iterator[DeploymentHandle]:
    echo = serve.deployment(
        name="Echo",
        num_replicas=REPLICAS,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1_000_000,
        request_router_config=RequestRouterConfig(
            request_router_class=ROUTER,
            request_router_kwargs={"slack": SLACK, "step_tokens": STEP},
        ),
    )(Echo)
    app = serve.deployment(
        name="Front", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1_000_000
    )(Front)
    yield serve.run(app.bind(echo.bind()), name="router", route_prefix=None)
    serve.delete("router")


@pytest.fixture(scope="module")
def echo(front: DeploymentHandle) -> DeploymentHandle:
    return serve.get_deployment_handle("Echo", "router")


def request(first: int, *, length: int = 10 * STEP, **fields) -> Request:
    """Prompts of different first tokens share nothing; those of the same share all they have."""
    fields.setdefault("request_id", f"{first} {time.monotonic_ns()}")
    return Request(prompt_token_ids=tuple(range(first, first + length)), **fields)


def ask(handle: DeploymentHandle, *requests: Request) -> list[str]:
    """Ask for all at once; who answered."""
    asked = [handle.options(stream=True).generate.remote(each) for each in requests]
    return [answer for stream in asked for answer in stream]


def all_replicas(echo: DeploymentHandle) -> set[str]:
    answers = echo.broadcast("report").results(timeout_s=60, return_exceptions=True)
    return {answer for answer in answers if isinstance(answer, str)}


def test_a_prompt_goes_where_its_prefix_was_served(echo: DeploymentHandle) -> None:
    homes = {first: ask(echo, request(first))[0] for first in range(0, 3000, 1000)}
    assert set(homes.values()) == all_replicas(echo)  # each prompt to one that had none
    for length in (12 * STEP, 20 * STEP, 11 * STEP):
        for first, home in homes.items():
            assert ask(echo, request(first, length=length)) == [home]
    elsewhere = ask(echo, *(request(0, cache_salt=f"tenant {n}") for n in range(REPLICAS)))
    assert len(set(elsewhere)) == REPLICAS  # their blocks are of no use to others


def test_a_session_stays_whoever_routes_it(front: DeploymentHandle, echo: DeploymentHandle) -> None:
    homes = {
        session: ask(echo, request(n * 1000, session_id=session))[0]
        for n, session in enumerate(SESSIONS)
    }
    assert set(homes.values()) == all_replicas(echo)
    for n, session in enumerate(SESSIONS):
        # Even with a prompt that another replica knows.
        other = request((n + 1) % len(SESSIONS) * 1000, session_id=session)
        assert ask(front, other) == [homes[session]]


def test_load_is_spread_and_a_prefix_that_all_want_is_too(echo: DeploymentHandle) -> None:
    several = ask(echo, *(request(10**6 * (n + 1), timeout_s=1) for n in range(10 * REPLICAS)))
    assert sorted(Counter(several).values()) == [10] * REPLICAS
    same = Counter(ask(echo, *(request(77, timeout_s=1) for _ in range(10 * REPLICAS))))
    assert len(same) == REPLICAS
    assert max(same.values()) <= min(same.values()) + SLACK + 1


def test_a_replica_that_dies_is_asked_no_more(echo: DeploymentHandle) -> None:
    before = all_replicas(echo)
    homes = {session: ask(echo, request(5, session_id=session))[0] for session in SESSIONS}
    lost = homes[SESSIONS[0]]
    with pytest.raises(RayActorError):
        ask(echo, request(5, request_id="die", session_id=SESSIONS[0]))
    resumed = (Resumed(token_ids=(1, 2), depths=(4, 4)),)
    after = {
        session: ask(echo, request(5, session_id=session, resumed=resumed))[0]
        for session in SESSIONS
    }
    assert lost not in after.values()
    # Only its own sessions move.
    assert all(after[s] == home for s, home in homes.items() if home != lost)
    deadline = time.monotonic() + 60
    while len(now := all_replicas(echo)) < REPLICAS:
        assert time.monotonic() < deadline, f"no new replica: {now}"
        time.sleep(0.2)
    assert lost not in now
    assert len(now - before) == 1
