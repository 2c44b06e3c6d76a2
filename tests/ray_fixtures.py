"""One Ray with one server for all tests that need it, however many folders they are in.

A conftest takes what it needs by ``from tests.ray_fixtures import server``. Pytest would make a
session fixture of two conftests twice, so the server itself is kept here.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import httpx
import pytest
import ray
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from ray.serve.context import _get_global_client

KEYS = ("test-key-one", "test-key-two")
# Set before Ray starts: its workers inherit the environment.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def free_port() -> int:
    """A port on loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class TestServer:
    """A server under test.

    Attributes:
        mlflow: the tracking server that it knows, which nothing has written to at first.
    """

    __test__ = False

    url: str
    model: str
    mlflow: str = ""

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {KEYS[0]}"}

    def http(self, **options: object) -> httpx.Client:
        """A client with a key."""
        options.setdefault("headers", self.headers)
        return httpx.Client(base_url=self.url, timeout=120, trust_env=False, **options)  # type: ignore[arg-type]

    def openai(self) -> OpenAI:
        """The official client; it must not hide failures by trying again."""
        return OpenAI(
            base_url=f"{self.url}/v1",
            api_key=KEYS[1],
            max_retries=0,
            timeout=120,
            http_client=httpx.Client(trust_env=False, timeout=120),
        )

    def metrics(self) -> dict[str, float]:
        """Samples of ``/metrics``, those of several replicas and label sets added up."""
        with self.http() as http:
            text = http.get("/metrics").raise_for_status().text
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                reason = sample.labels.get("finished_reason")
                name = f"{sample.name}:{reason}" if reason else sample.name
                found[name] = found.get(name, 0) + sample.value
        return found

    def wait_for(self, metric: str, wanted: Callable[[float], bool], seconds: float = 30) -> None:
        """Wait until a metric has a wanted value."""
        deadline = time.monotonic() + seconds
        while not wanted(value := self.metrics().get(metric, 0)):
            assert time.monotonic() < deadline, f"{metric} is still {value}"
            time.sleep(0.1)

    def wait_until_idle(self) -> None:
        """Wait until no request is left in any engine, and no KV block is held by one."""
        for figure in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            self.wait_for(f"fathom_{figure}", lambda value: value == 0)


@lru_cache(maxsize=1)
def _start() -> tuple[TestServer, Callable[[], None]]:
    from deployments.app import run
    from deployments.cluster import start_ray
    from fathom.config import EngineConfig, ServeConfig
    from fathom.models.pull import pull
    from fathom.models.resolve import find_local

    os.environ["FATHOM_API_KEY"] = ",".join(KEYS)
    # float32: so that modes can be compared token by token.
    engine = EngineConfig(dtype="float32", kv_cache_bytes=512 << 20, pause_drafting=False)
    if find_local(engine.model) is None:
        pull(engine.model)
    folder = tempfile.mkdtemp(prefix="fathom-test-mlflow-")
    mlflow = f"sqlite:///{folder}/mlflow.db"
    config = ServeConfig(engine=engine, port=free_port(), drain_s=5, mlflow=mlflow)
    start_ray(4)  # room for a second application
    running = run(config, blocking=False)

    def stop() -> None:
        running.stop()
        # Handles of this process to pools that follow their load would go on to tell their queues,
        # for which Ray would be started anew.
        client: Any = _get_global_client()
        client.shutdown_cached_handles()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)

    return TestServer(url=running.url, model=engine.model, mlflow=mlflow), stop


@pytest.fixture(scope="session")
def server(pytestconfig: pytest.Config) -> TestServer:
    """The default model in float32 behind HTTP on loopback, with two API keys."""
    started = _start.cache_info().currsize
    test_server, stop = _start()
    if not started:
        pytestconfig.add_cleanup(stop)
    return test_server
