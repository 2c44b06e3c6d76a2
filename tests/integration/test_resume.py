"""Replicas and ingresses get SIGKILL: clients notice nothing, and nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve

from deployments.handle_backend import HandleBackend
from fathom.api.backend import ReplicaReport
from fathom.types import AcceptMode, Request, SamplingParams
from tests.ray_fixtures import TestServer
from tests.tiny_models import save_random_llama, tiny_model

__all__ = ["tiny_model"]

PATH = "/v1/completions"
REPLICAS, INGRESSES = "SERVE_REPLICA::again#Engine#", "SERVE_REPLICA::again#Ingress#"
LONGEST = 20_000


@pytest.fixture(scope="module")
def again(
    server: TestServer, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestServer]:
    """Two replicas of a model that is small, but can go on for long."""
    from deployments.app import build

    path = tmp_path_factory.mktemp("again")
    shutil.copytree(tiny_model, path, dirs_exist_ok=True)
    save_random_llama(
        path,
        seed=2,
        vocab_size=257,
        eos_token_id=256,
        bos_token_id=None,
        max_position_embeddings=LONGEST,
    )
    application = build(
        {
            "engine": {
                "model": str(path),
                "dtype": "float32",
                "kv_cache_bytes": 64 << 20,
                "adapter": "none",
                "pause_drafting": False,  # depths must not depend on speed
            },
            "model_name": "tiny",
            "num_replicas": 2,
            "cpus_per_replica": 0.2,
            "request_timeout_s": 240,
            "keep_streams_s": 0,
            "drain_s": 2,
        }
    )
    serve.run(application, name="again", route_prefix="/again")
    yield TestServer(url=f"{server.url}/again", model="tiny")
    serve.delete("again")


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def pids_of(prefix: str) -> dict[str, int]:
    """Processes of the live actors whose names begin so, by the rest of their names."""
    table = ray._private.state.state.actor_table(None, None, "ALIVE")
    return {
        actor["Name"].removeprefix(prefix): actor["Pid"]
        for actor in table.values()
        if actor["Name"].startswith(prefix)
    }


def reports() -> list[ReplicaReport]:
    answers = serve.get_deployment_handle("Engine", "again").broadcast("report")
    found = answers.results(timeout_s=20, return_exceptions=True)
    return [each for each in found if isinstance(each, ReplicaReport)]


def busiest() -> ReplicaReport:
    return max(reports(), key=lambda report: report.stats["num_requests_running"])


def idle() -> bool:
    figures = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return all(report.stats[name] == 0 for report in reports() for name in figures)


class Reader(threading.Thread):
    """Reads one stream to its end."""

    def __init__(self, server: TestServer, body: dict[str, Any]) -> None:
        super().__init__()
        self._server, self._body = server, {"model": server.model, **body, "stream": True}
        self.chunks: list[dict[str, Any]] = []
        self.failure: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            with (
                self._server.http() as http,
                http.stream("POST", PATH, json=self._body) as answer,
            ):
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        self.chunks.append(json.loads(line[6:]))
        except httpx.HTTPError as error:
            self.failure = error

    def story(self) -> list[tuple[Any, ...]]:
        """Text, depths and end of each completion."""
        self.join(120)
        assert not self.is_alive() and self.failure is None
        entries = [entry for chunk in self.chunks for entry in chunk["choices"]]
        return [
            (
                "".join(entry["text"] for entry in own),
                [depth for entry in own for depth in entry["depths"]],
                [entry["finish_reason"] for entry in own if entry["finish_reason"]],
            )
            for index in range(self._body.get("n", 1))
            for own in [[entry for entry in entries if entry["index"] == index]]
        ]

    @property
    def usage(self) -> dict[str, Any]:
        return self.chunks[-1]["usage"]


def bodies(max_tokens: int) -> list[dict[str, Any]]:
    """A request in every mode, and a drawn one of two completions with a stop string."""
    common = {
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "depths": True,
        "stream_options": {"include_usage": True},
    }
    greedy = [
        {
            "prompt": f"In mode {mode}",
            "compute": {"mode": mode.value, "exit_threshold": 0.05},
            "temperature": 0,
            **common,
        }
        for mode in AcceptMode
    ]
    drawn = {"prompt": "Anything", "n": 2, "seed": 7, "temperature": 1, "stop": "\x01\x02\x03\x04"}
    return [*greedy, {**drawn, **common}]


def test_streams_outlive_their_replica(again: TestServer) -> None:
    """The replica with most of them is killed, then all there are: one is started meanwhile."""
    asked = bodies(max_tokens=600)
    with ThreadPoolExecutor(len(asked)) as pool:
        undisturbed = list(pool.map(lambda body: Reader(again, body).story(), asked))
    assert any(depth < 4 for story in undisturbed for _, depths, _ in story for depth in depths)

    for victims in (1, 2):
        until(lambda: len(reports()) == 2, 120)
        readers = [Reader(again, body) for body in asked]
        until(lambda readers=readers: all(len(reader.chunks) >= 5 for reader in readers))
        name = busiest().replica
        for replica, pid in pids_of(REPLICAS).items():
            if victims == 2 or replica == name:
                os.kill(pid, signal.SIGKILL)
        assert [reader.story() for reader in readers] == undisturbed
        resumed = [reader.usage["compute"]["resumptions"] for reader in readers]
        assert sum(map(bool, resumed)) >= (1 if victims == 1 else len(asked)), resumed
        for reader, story in zip(readers, undisturbed, strict=True):
            assert reader.usage["completion_tokens"] == sum(len(depths) for _, depths, _ in story)
    assert again.metrics()["fathom_request_resumptions_total"] >= len(asked) + 1
    until(idle, 20)


@ray.remote(num_cpus=0)
class Asker:
    """Asks the replicas as an ingress does, and is told by the test which of them are dead."""

    def __init__(self) -> None:
        handle = serve.get_deployment_handle("Engine", "again")
        self._dead: set[str] = set()
        self._backend = HandleBackend(
            handle, limit=1, is_alive=lambda name: name.removeprefix(REPLICAS) not in self._dead
        )
        self._tokens: list[int] = []

    async def run(self, request: Request) -> tuple[list[int], int]:
        """Tokens, and how often the request went on elsewhere."""
        self._tokens, resumptions = [], 0
        async for batch in self._backend.generate(request):
            for output in batch:
                self._tokens += [token.id for token in output.tokens]
                if output.usage is not None:
                    resumptions = output.usage.compute.resumptions
        return self._tokens, resumptions

    async def so_far(self) -> int:
        return len(self._tokens)

    async def declare_dead(self, replica: str) -> None:
        self._dead.add(replica)


def test_a_replica_that_is_gone_without_a_word(again: TestServer) -> None:
    """Its connections stay open, as when a machine loses its power: only Ray knows."""
    until(lambda: len(reports()) == 2, 120)
    request = Request(
        request_id="silence",
        prompt_token_ids=(1, 2, 3),
        sampling=SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True),
    )
    asker = Asker.options(name="asker", namespace="serve").remote()
    undisturbed, _ = ray.get(asker.run.remote(request), timeout=60)
    asked = asker.run.remote(request)
    until(lambda: 5 < ray.get(asker.so_far.remote()) < 1000)
    name = busiest().replica
    pid = pids_of(REPLICAS)[name]
    os.kill(pid, signal.SIGSTOP)
    ray.get(asker.declare_dead.remote(name))
    try:
        assert ray.get(asked, timeout=30) == (undisturbed, 1)
    finally:
        os.kill(pid, signal.SIGKILL)


def test_requests_of_a_dead_ingress_end(again: TestServer) -> None:
    until(lambda: len(reports()) == 2, 120)
    body = {"prompt": "On and on", "max_tokens": LONGEST - 100, "ignore_eos": True}
    reader = Reader(again, body)
    until(lambda: busiest().stats["num_requests_running"] == 1)
    (ingress,) = pids_of(INGRESSES).values()
    os.kill(ingress, signal.SIGKILL)
    until(idle, 10)  # the request would take more than that, and has minutes
    reader.join(60)
    assert reader.chunks[-1:] == [] or "error" in reader.chunks[-1] or reader.failure is not None
