"""Operating points promoted on a real Serve under load: no replica restarts, no request fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from openai import OpenAI
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from deployments.user_config import user_config_of
from fathom.engine.build import build_engine
from fathom.tuning.operating_points import OperatingPoints
from tests.integration.apart import engine_settings, save_model
from tests.points import INFO, points_of
from tests.ray_fixtures import TestServer
from tests.tiny_models import tiny_model

__all__ = ["tiny_model"]

APPLICATION = "takeover"


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("takeover") / "model", tiny_model)


@pytest.fixture(scope="module")
def points(model: Path) -> OperatingPoints:
    engine = build_engine(engine_settings(model))
    found = points_of(engine.info)
    engine.close()
    return found


def arguments(model: Path, **more: Any) -> dict[str, Any]:
    return {
        "engine": {
            "model": str(model), "dtype": "float32", "kv_cache_bytes": 8 << 20, "adapter": "none",
            "max_num_batched_tokens": 32,
        },
        "load_aware": {"enabled": True},
        "cpus_per_replica": 0.5,
        "drain_s": 2,
        **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def two(server: TestServer, model: Path) -> Iterator[TestServer]:
    """Two ingresses before two replicas, deployed as ``fathom serve`` does."""
    from deployments.app import build

    application = build(arguments(model, num_replicas=2, num_ingress_replicas=2))
    serve.run(application, name=APPLICATION, route_prefix="/takeover")
    yield TestServer(url=f"{server.url}/takeover", model=str(model))
    serve.delete(APPLICATION)


def replicas(application: str = APPLICATION) -> set[str]:
    """Names of an application's replicas of all kinds; one that is started anew has another."""
    prefix = f"SERVE_REPLICA::{application}#"
    actors = ray.util.list_named_actors(all_namespaces=True)
    return {each["name"] for each in actors if each["name"].startswith(prefix)}


def revisions(application: str, *kinds: str) -> list[object]:
    """``points_revision`` of all replicas."""
    found: list[object] = []
    for kind in kinds:
        asked = serve.get_deployment_handle(kind, application).broadcast("points_revision")
        found += asked.results(return_exceptions=True)
    return found


def change(server: TestServer, route: str = "", **body: Any) -> dict[str, Any]:
    with server.http() as http:
        answer = http.post(f"/v1/operating_points{route}", json=body or None)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


def ask(client: OpenAI, model: str, tokens: int = 4) -> str:
    """The operating point that a request which names no compute gets."""
    answer = client.completions.create(
        model=model, prompt="abc", max_tokens=tokens, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    return str(answer.usage.model_dump()["compute"]["operating_point"])


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def is_ready(server: TestServer) -> bool:
    with server.http() as http:
        return http.get("/ready").status_code == 200


class Traffic:
    """Streams and short requests without a pause, until the end of the block.

    Attributes:
        streams: when each began and ended, and its operating point. points: of short requests.
    """

    def __init__(self, server: TestServer) -> None:
        self._server = server
        self._stop = threading.Event()
        self.streams: list[tuple[float, float, str]] = []
        self.points: list[str] = []

    def __enter__(self) -> Traffic:
        self._pool = ThreadPoolExecutor(5)
        self._work = [self._pool.submit(self._stream) for _ in range(3)]
        self._work += [self._pool.submit(self._short) for _ in range(2)]
        wait_until(lambda: len(self.streams) >= 3 and len(self.points) >= 3)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for each in self._work:
            each.result()  # raises what a request raised: none may fail
        self._pool.shutdown()

    def _stream(self) -> None:
        with self._server.openai() as client:
            while not self._stop.is_set():
                start = time.monotonic()
                events = client.completions.create(
                    model=self._server.model, prompt="abcdef", max_tokens=100, stream=True, n=2,
                    stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
                )  # fmt: skip
                *news, last = list(events)
                ends = [c.finish_reason for event in news for c in event.choices]
                assert ends.count("length") == 2
                assert last.usage is not None
                assert last.usage.completion_tokens == 200
                point = last.usage.model_dump()["compute"]["operating_point"]
                self.streams.append((start, time.monotonic(), point))

    def _short(self) -> None:
        with self._server.openai() as client:
            while not self._stop.is_set():
                self.points.append(ask(client, self._server.model))


def test_points_are_taken_over_under_load(two: TestServer, points: OperatingPoints) -> None:
    before = replicas()
    assert len(before) == 4
    content = points.as_dict()
    changes: list[tuple[float, float, str]] = []
    with two.openai() as client, two.http() as http, Traffic(two) as traffic:
        assert ask(client, two.model) == ""
        for number, (wanted, route, body) in enumerate(
            [
                ("draft", "", {"points": content, "default": "draft", "source": "models:/x/1"}),
                ("sketch", "", {"points": content, "default": "sketch"}),
                ("draft", "/rollback", {}),
                ("sketch", "/rollback", {}),
            ]
        ):
            start = time.monotonic()
            found = change(two, route, **body)
            changes.append((start, time.monotonic(), wanted))
            assert (found["default"], found["can_roll_back"]) == (wanted, True)
            assert abs(found["since"] - time.time()) < 30
            if not number:
                assert found["source"] == "models:/x/1"
                assert found["digest"] == points.digest
            # Whichever of the two ingresses answers, and whichever replica runs it.
            with ThreadPoolExecutor(4) as pool:
                got = list(pool.map(lambda _: ask(client, two.model), range(12)))
            assert set(got) == {wanted}
            listed = [http.get("/v1/operating_points").json() for _ in range(6)]
            assert {each["default"] for each in listed} == {wanted}
            assert len({each["since"] for each in listed}) == 1
        # Again: nothing changes.
        again = change(two, "", points=content, default="sketch")
        assert again["since"] == found["since"]
    assert replicas() == before
    assert set(traffic.points) == {"", "draft", "sketch"}
    # A stream gets what was the default when it came, however it changed while it ran.
    under_way = 0
    for start, end, point in traffic.streams:
        settled = [wanted for _, there, wanted in changes if there < start]
        changing = [wanted for began, there, wanted in changes if began < start < there]
        last = settled[-1] if settled else ""
        assert point in {last, *changing}, (start, end, point, changes)
        under_way += any(start < began < end for began, _, _ in changes)
    assert under_way >= len(changes)


def test_what_starts_later_has_the_points(two: TestServer, points: OperatingPoints) -> None:
    change(two, "", points=points.as_dict(), default="draft")
    revision = user_config_of(APPLICATION, "Ingress")["revision"]
    kinds = ("Engine", "Ingress")
    killed = {min(name for name in replicas() if f"#{kind}#" in name) for kind in kinds}
    for name in killed:
        ray.kill(ray.get_actor(name, namespace="serve"))

    wait_until(lambda: len(replicas()) == 4 and not killed & replicas())
    wait_until(lambda: revisions(APPLICATION, *kinds) == [revision] * 4)
    with two.openai() as client:
        assert {ask(client, two.model) for _ in range(6)} == {"draft"}


def test_points_that_cannot_be_taken_change_nothing(
    two: TestServer, points: OperatingPoints
) -> None:
    own = points.as_dict()
    deep = {**own, "points": {"deep": {"compute": {"max_stack": 64}}}}
    low = {"mode": "free", "policy": "budget", "budget": 0.05}
    # One that nobody names would stop replicas all the same: it is a step of the ladder.
    least = {**own, "points": {"low": {"compute": low, "measured": {"budget": 0.05}}}}
    with two.http() as http:
        before = http.get("/v1/operating_points").json()
        for body, status, words in (
            ({"points": points_of(INFO).as_dict()}, 409, "measured on another model"),
            ({"points": {**own, "version": 9}}, 400, "operating points of version 9"),
            ({"points": own, "default": "none"}, 400, "default must be one of exact, balanced"),
            ({"points": deep, "default": "deep"}, 400, "max_stack must be below"),
            ({"points": least}, 400, "compute.budget must be"),
        ):
            answer = http.post("/v1/operating_points", json=body)
            assert answer.status_code == status, answer.text
            assert words in answer.json()["error"]["message"]
        assert http.get("/v1/operating_points").json() == before


def test_a_deployed_file_takes_points_over_and_back(
    server: TestServer, model: Path, points: OperatingPoints
) -> None:
    """As ``serve deploy`` does it, with shallow and deep replicas apart."""
    body = {
        "name": "declared",
        "import_path": "deployments.app:build",
        "route_prefix": "/declared",
        "args": arguments(
            model, topology="disaggregated", shallow={"cpus": 0.5}, deep={"cpus": 0.5}
        ),
    }
    file = ServeDeploySchema.model_validate({"applications": [body]})
    client: Any = _get_global_client()
    own = TestServer(url=f"{server.url}/declared", model=str(model))

    def default() -> Any:
        with own.http() as http:
            return http.get("/v1/operating_points").raise_for_status().json()["default"]

    try:
        client.deploy_apps(file)
        wait_until(lambda: is_ready(own), 180)
        before = replicas("declared")
        assert len(before) == 3
        assert change(own, "", points=points.as_dict(), default="draft")["default"] == "draft"
        with own.openai() as openai:
            assert ask(openai, own.model) == "draft"
        details = serve.status().applications["declared"]
        assert details.status == "RUNNING"
        client.deploy_apps(file)  # the file is the truth when it is deployed again
        wait_until(lambda: default() is None)
        assert replicas("declared") == before
    finally:
        serve.delete("declared")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["run", "deploy"])
def test_a_pool_that_follows_its_load_keeps_its_size(
    server: TestServer, model: Path, points: OperatingPoints, how: str
) -> None:
    """Shallow replicas with a deep one beside each, as many as the load needs."""
    from deployments.app import build

    name = f"follows-{how}"
    body = arguments(
        model,
        topology="disaggregated",
        placement="beside",
        shallow={
            "cpus": 0.3, "max_replicas": 2, "target": 2, "look_back_s": 2, "upscale_delay_s": 0.5,
            "downscale_delay_s": 3,
        },
        deep={"cpus": 0.3},
    )  # fmt: skip
    own = TestServer(url=f"{server.url}/{name}", model=str(model))

    def shallow() -> int:
        found = serve.status().applications[name].deployments["Shallow"]
        return found.replica_states.get("RUNNING", 0)

    try:
        if how == "run":
            serve.run(build(body), name=name, route_prefix=f"/{name}")
        else:
            declared = {
                "name": name, "import_path": "deployments.app:build", "route_prefix": f"/{name}",
                "args": body,
            }  # fmt: skip
            client: Any = _get_global_client()
            client.deploy_apps(ServeDeploySchema.model_validate({"applications": [declared]}))
        wait_until(lambda: is_ready(own), 180)
        with Traffic(own):
            wait_until(lambda: shallow() == 2, 180)
            before = replicas(name)
            assert change(own, "", points=points.as_dict(), default="draft")["default"] == "draft"
            (revision,) = set(revisions(name, "Ingress", "Shallow"))
            assert revision == user_config_of(name, "Ingress")["revision"]
            calm = time.monotonic() + 5  # Serve would have let one go by then
            while time.monotonic() < calm:
                assert replicas(name) == before
                time.sleep(0.2)
        wait_until(lambda: len(replicas(name)) == 2, 120)  # of each kind one
        left = replicas(name)
        with Traffic(own) as traffic:
            wait_until(lambda: shallow() == 2, 180)
            assert len(replicas(name) - left) == 1
            wait_until(lambda: revisions(name, "Ingress", "Shallow") == [revision] * 3)
        assert set(traffic.points) == {point for _, _, point in traffic.streams} == {"draft"}
    finally:
        serve.delete(name)
