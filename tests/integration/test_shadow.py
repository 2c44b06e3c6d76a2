"""Shadow mode of a real server: what it tells MLflow, Prometheus and the terminal; and traces."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import mlflow
import pytest
import ray
from ray import serve

from deployments.shadow import find_shadow
from fathom.cli import main
from fathom.config import ServeConfig, ShadowConfig
from fathom.engine.build import build_engine
from fathom.tuning.serve_run import ALERT
from tests.integration.apart import engine_settings, save_model
from tests.otlp import Receiver
from tests.points import points_of
from tests.ray_fixtures import KEYS, TestServer
from tests.tiny_models import tiny_model

__all__ = ["tiny_model"]

APPLICATION = "shadowed"
SHADOW = {"rate": 1.0, "every_s": 0.5}
TRACE = "0af7651916cd43dd8448eb211c80319c"


@dataclass
class Shadowed:
    """The application under test."""

    url: str
    model: str
    mlflow: str
    receiver: Receiver
    http: httpx.Client

    def ask(self, compute: dict[str, Any], **headers: str) -> dict[str, Any]:
        body = {"model": self.model, "prompt": "abc", "max_tokens": 16, "ignore_eos": True,
                "temperature": 0, "compute": compute}  # fmt: skip
        answer = self.http.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def shadow(self) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get("/v1/exits").raise_for_status().json()["shadow"]
        return found

    def run_id(self) -> str:
        """Of the run in MLflow, once it is there."""

        def known() -> str | None:
            found: str | None = (self.shadow() or {"mlflow": {"run_id": None}})["mlflow"]["run_id"]
            return found

        wait_until(known)
        return str(known())

    def point(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = (self.shadow() or {"points": {}})["points"].get(name, {})
        return found


@pytest.fixture(scope="module")
def shadowed(
    server: TestServer, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shadowed]:
    """A random model with made-up operating points: no promise of theirs can hold."""
    from deployments.app import build

    folder = tmp_path_factory.mktemp("shadow")
    model = save_model(folder / "model", tiny_model)
    points_of(build_engine(engine_settings(model)).info).save(folder / "points.yaml")
    receiver = Receiver()
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    application = build(
        {
            "engine": {
                "model": str(model), "dtype": "float32", "kv_cache_bytes": 8 << 20,
                "adapter": "none",
            },
            "operating_points": str(folder / "points.yaml"),
            "cpus_per_replica": 0.5,
            "drain_s": 1,
            "mlflow": uri,
            "shadow": SHADOW,
            "otlp_traces_endpoint": receiver.url,
        }
    )  # fmt: skip
    serve.run(application, name=APPLICATION, route_prefix="/shadowed")
    url = f"{server.url}/shadowed"
    with TestServer(url=url, model=str(model)).http() as http:
        yield Shadowed(url, str(model), uri, receiver, http)
    receiver.close()


def wait_until(true: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def actor_of(shadowed: Shadowed) -> Any:
    config = ServeConfig(mlflow=shadowed.mlflow, shadow=ShadowConfig(**SHADOW))
    return find_shadow(APPLICATION, config)


def test_a_promise_that_does_not_hold_raises_the_alarm(
    shadowed: Shadowed, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = [shadowed.ask({"operating_point": "fast"})["usage"]["compute"] for _ in range(40)]
    wait_until(lambda: shadowed.point("fast").get("completions") == 40)
    point = shadowed.point("fast")
    assert point["alert"]
    assert point["decided"] == 40 * 16
    assert point["exited"] == sum(page["exited"] for page in pages)
    layers = sum(page["shallow_layer_tokens"] + page["deep_layer_tokens"] for page in pages)
    assert point["layer_tokens"] == layers
    # Flushes have seen every row that left: what they accepted is what agrees.
    assert point["wrong"] == sum(page["verified"] - page["accepted"] for page in pages)
    text = shadowed.http.get("/metrics").text
    assert 'fathom_drift_alert{model_name="' in text
    assert f'operating_point="fast"}} {40.0}' in text  # fathom_shadow_completions_total
    monkeypatch.setenv("FATHOM_API_KEY", KEYS[0])
    assert main(["exits", "show", "--url", shadowed.url]) == 0
    assert "run `fathom tune` again" in capsys.readouterr().out.replace("\n", " ")


def test_mlflow_has_a_run_of_the_server(shadowed: Shadowed) -> None:
    shadowed.ask({"operating_point": "fast"})
    run_id = shadowed.run_id()
    client = mlflow.MlflowClient(shadowed.mlflow)  # not before: both would make the tables
    wait_until(lambda: "fast/agreement" in client.get_run(run_id).data.metrics)
    run = client.get_run(run_id)
    assert run.data.tags["fathom.application"] == APPLICATION
    wait_until(lambda: client.get_run(run_id).data.tags[ALERT] == "fast")
    history = client.get_metric_history(run_id, "fast/completions")
    assert sum(m.value for m in history) <= shadowed.point("fast")["completions"]


def test_mode_copy_is_checked_by_scoring_its_text(shadowed: Shadowed) -> None:
    answer = shadowed.ask({"mode": "copy", "policy": "always"})
    assert answer["usage"]["compute"]["exited"] > 10
    wait_until(lambda: shadowed.point("other").get("check_layer_tokens"))
    found = shadowed.point("other")
    assert found["completions"] == 1
    # Three tokens of prompt and 16 of answer, through every layer of a model of four.
    assert found["check_layer_tokens"] in (4 * 18, 4 * 19)


def test_a_lost_actor_goes_on_with_the_run(shadowed: Shadowed) -> None:
    run_id = shadowed.run_id()
    ray.kill(actor_of(shadowed), no_restart=False)  # Ray starts it anew
    wait_until(shadowed.shadow)
    wait_until(lambda: shadowed.ask({"operating_point": "exact"}) and shadowed.point("exact"))
    assert shadowed.run_id() == run_id


def test_traces_come_through_serves_proxy(shadowed: Shadowed) -> None:
    answer = shadowed.ask({"mode": "free"}, traceparent=f"00-{TRACE}-b7ad6b7169203331-01")
    assert answer["choices"]

    def there() -> bool:
        return any(span.trace_id.hex() == TRACE for span in shadowed.receiver.spans)

    wait_until(there, 30)


def test_the_run_ends_with_the_application(shadowed: Shadowed) -> None:
    """The last that needs the application: it takes it away."""
    run_id = shadowed.run_id()
    serve.delete(APPLICATION)
    client = mlflow.MlflowClient(shadowed.mlflow)
    wait_until(lambda: client.get_run(run_id).info.status == "FINISHED")
    wait_until(lambda: not [n for n in _names() if n.startswith(f"shadow-of-{APPLICATION}/")])


COUNT = 40  # requests
TOPOLOGIES: dict[str, dict[str, Any]] = {
    "fused": {"num_replicas": 2, "num_ingress_replicas": 2},
    "disaggregated": {
        "topology": "disaggregated",
        "shallow": {"cpus": 0.3, "num_replicas": 2},
        "deep": {"cpus": 0.3},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("topology", list(TOPOLOGIES))
def test_what_replicas_see_is_added_up(
    server: TestServer, tiny_model: Path, tmp_path: Path, topology: str
) -> None:
    from deployments.app import build

    model = save_model(tmp_path / "model", tiny_model)
    points_of(build_engine(engine_settings(model)).info).save(tmp_path / "points.yaml")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    name = f"shadowed-{topology}"
    application = build(
        {
            "engine": {
                "model": str(model), "dtype": "float32", "kv_cache_bytes": 8 << 20,
                "adapter": "none",
            },
            "operating_points": str(tmp_path / "points.yaml"),
            "cpus_per_replica": 0.4,
            "drain_s": 1,
            "mlflow": uri,
            "shadow": SHADOW,
            **TOPOLOGIES[topology],
        }
    )  # fmt: skip
    serve.run(application, name=name, route_prefix=f"/{name}")
    own = TestServer(url=f"{server.url}/{name}", model=str(model))
    try:
        with own.http() as http:
            under_test = Shadowed(own.url, str(model), uri, None, http)  # type: ignore[arg-type]
            with ThreadPoolExecutor(4) as pool:
                asked = list(
                    pool.map(lambda _: under_test.ask({"operating_point": "fast"}), range(COUNT))
                )
            pages = [each["usage"]["compute"] for each in asked]
            # Both have worked, and both are heard.
            figure = "fathom_replica_generation_tokens_total{"
            lines = [line for line in http.get("/metrics").text.splitlines()
                     if line.startswith(figure)]  # fmt: skip
            assert len(lines) == 2
            assert all(float(line.split()[-1]) > 0 for line in lines), lines
            wait_until(lambda: under_test.point("fast").get("completions") == COUNT)
            point = under_test.point("fast")
            assert point["alert"]
            assert point["decided"] == COUNT * 16
            assert point["exited"] == sum(page["exited"] for page in pages)
            assert point["wrong"] == sum(page["verified"] - page["accepted"] for page in pages)
            run_id = under_test.run_id()
            client = mlflow.MlflowClient(uri)
            wait_until(lambda: client.get_run(run_id).data.tags[ALERT] == "fast")
            wait_until(
                lambda: (
                    sum(m.value for m in client.get_metric_history(run_id, "fast/completions"))
                    == COUNT
                )
            )
    finally:
        serve.delete(name)
    wait_until(lambda: client.get_run(run_id).info.status == "FINISHED")


def _names() -> list[str]:
    return [each["name"] for each in ray.util.list_named_actors(all_namespaces=True)]
