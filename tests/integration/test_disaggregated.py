"""Shallow and deep replicas as deployments: equal outputs, updates, scaling, placement."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from ray.util.placement_group import placement_group_table

from deployments.app import build
from deployments.shared import credentials_of
from fathom.config import (
    DataPlaneConfig,
    DeepConfig,
    EngineConfig,
    Placement,
    PoolConfig,
    ServeConfig,
    Topology,
)
from fathom.types import Request
from tests.integration.apart import (
    engine_settings,
    in_one_process,
    requests_of,
    save_model,
    tokens_of,
)
from tests.ray_fixtures import TestServer
from tests.tiny_models import tiny_model

__all__ = ["tiny_model"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> EngineConfig:
    return engine_settings(save_model(tmp_path_factory.mktemp("apart"), tiny_model))


@pytest.fixture(scope="module")
def config(settings: EngineConfig) -> ServeConfig:
    return ServeConfig(
        engine=settings,
        model_name="tiny",
        topology=Topology.DISAGGREGATED,
        shallow=PoolConfig(
            cpus=0.2,
            max_replicas=2,
            target=6,
            look_back_s=2,
            upscale_delay_s=0.5,
            downscale_delay_s=2,
        ),
        deep=DeepConfig(cpus=0.2),
        num_ingress_replicas=2,
        data_plane=DataPlaneConfig(tls=True),
        drain_s=15,
    )


@pytest.fixture(scope="module")
def apart(server: TestServer, config: ServeConfig) -> Iterator[TestServer]:
    serve.run(build(config), name="apart", route_prefix="/apart")
    yield TestServer(url=f"{server.url}/apart", model="tiny")
    serve.delete("apart")


def generate(application: str, request: Request) -> list[tuple[int, int]]:
    """What a request gives at the application's replicas, with the depth of each token."""
    handle = serve.get_deployment_handle("Shallow", application).options(stream=True)
    items = handle.generate.remote(request)
    return tokens_of(output for outputs in items for output in outputs)


def running(application: str, deployment: str) -> int:
    status = serve.status().applications[application].deployments[deployment]
    return status.replica_states.get("RUNNING", 0)


def until(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.1)


def test_outputs_are_those_of_one_process_in_every_mode(
    apart: TestServer, settings: EngineConfig
) -> None:
    requests = requests_of(seed=1)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda request: generate("apart", request), requests))
    assert found == in_one_process(settings, requests)
    assert any(depth < 4 for tokens in found for _, depth in tokens)  # some left early
    figures = apart.metrics()
    assert figures["fathom_flushes_total"] > 0
    assert figures["fathom_flushes_away"] == figures["fathom_deep_reopens_total"] == 0


class Load:
    """Clients that stream one completion after another; what goes wrong is kept."""

    def __init__(self, server: TestServer, clients: int) -> None:
        self.server = server
        self.texts: set[str] = set()
        self.faults: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.texts.add(self._stream())
            except (httpx.HTTPError, KeyError, ValueError) as error:
                self.faults.append(repr(error))

    def _stream(self) -> str:
        body = {
            "model": "tiny",
            "prompt": "Once upon a time",
            "max_tokens": 400,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        text, finished = "", False
        with (
            self.server.http() as http,
            http.stream("POST", "/v1/completions", json=body) as answer,
        ):
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line[6:])["choices"]
                    for choice in choices:
                        text += choice["text"]
                        finished = finished or choice["finish_reason"] == "length"
        if not finished:
            raise ValueError(f"the stream broke after {len(text)} characters")
        return text


def test_an_update_under_load_fails_no_request(apart: TestServer, config: ServeConfig) -> None:
    before, credentials = deployed_names("apart"), credentials_of("apart")
    with Load(apart, clients=3) as load:
        until(lambda: load.texts)
        changed = dataclasses.replace(config, stream_interval_s=0.01, max_queued_requests=999)
        serve.run(build(changed), name="apart", route_prefix="/apart")
        assert not before & deployed_names("apart")  # every replica is another one
        assert credentials_of("apart") == credentials  # or old and new could not work together
        load.texts.add(load._stream())
    assert not load.faults
    assert len(load.texts) == 1  # greedy: all the same, whichever replica began or ended it


def deployed_names(application: str) -> set[str]:
    actors = ray.util.list_named_actors(all_namespaces=True)
    prefix = f"SERVE_REPLICA::{application}#"
    return {actor["name"] for actor in actors if actor["name"].startswith(prefix)}


def test_a_pool_grows_under_load_and_shrinks_after_it(apart: TestServer) -> None:
    until(lambda: running("apart", "Shallow") == 1)
    with Load(apart, clients=12) as load:
        until(lambda: running("apart", "Shallow") == 2)
    until(lambda: running("apart", "Shallow") == 1)
    assert not load.faults
    assert running("apart", "Deep") == 1
    with apart.http() as http:  # whichever ingress answers
        text = http.get("/metrics").text
    ingresses = set(re.findall(r'^fathom_prompt_tokens_total.*ingress="(\w+)"', text, re.MULTILINE))
    assert len(ingresses) == 2


def test_beside_puts_both_into_one_placement_group(
    server: TestServer, config: ServeConfig, settings: EngineConfig
) -> None:
    pools = {"shallow": PoolConfig(cpus=0.2), "placement": Placement.BESIDE}
    serve.run(build(dataclasses.replace(config, **pools)), name="beside", route_prefix="/beside")
    try:
        (group,) = [
            each
            for each in placement_group_table().values()
            if each["name"].startswith("SERVE_REPLICA::beside#Shallow#")
            and each["state"] == "CREATED"
        ]
        assert group["strategy"] == "STRICT_PACK"
        # The cores of each of its bundles are taken by an actor in it.
        for bundle in (0, 1):
            cores = f"CPU_group_{bundle}_{group['placement_group_id']}"
            assert ray.cluster_resources()[cores] == 0.2
            assert ray.available_resources().get(cores, 0) == 0
        request = requests_of(seed=2, count=1)[2]
        assert [generate("beside", request)] == in_one_process(settings, [request])
    finally:
        serve.delete("beside")
    names = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    assert not [name for name in names if "beside" in name]  # nothing that was shared is left
