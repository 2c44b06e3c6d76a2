"""The routes that tell of exits and operating points, over a real engine."""

from __future__ import annotations

from starlette.testclient import TestClient

from fathom.api.app import create_app
from fathom.api.auth import digest
from fathom.api.convert import Defaults
from fathom.api.local import LocalBackend
from fathom.api.points import points_body
from fathom.api.service import Service
from fathom.engine.async_engine import AsyncEngine
from fathom.models.tokenizer import Tokenizer
from fathom.types import ComputePolicy
from tests.points import points_of
from tests.unit.api.conftest import KEY, MODEL


def test_exits_tells_what_was_seen(client: TestClient) -> None:
    body = {
        "model": MODEL, "prompt": "abc", "max_tokens": 40, "ignore_eos": True, "temperature": 0,
        "compute": {"mode": "free", "policy": "adaptive"},
    }  # fmt: skip
    for _ in range(3):
        assert client.post("/v1/completions", json=body).status_code == 200
    found = client.get("/v1/exits").json()
    (replica,) = found["replicas"]
    assert replica["replica"] == "local"
    assert replica["load_level"] == 0
    for state in (replica, found["merged"]):
        measure = state["measures"]["softmax_gap"]
        assert sum(measure["rows"].values()) >= 100
        assert measure["history"]
        assert 0.3 <= measure["adaptive_threshold"] <= 0.9
        assert {"alpha", "beta"} <= set(measure["mixture"]["agrees"])
    assert found["merged"]["engines"] == 1
    metrics = client.get("/metrics").text
    for line in (
        'fathom_exit_threshold{confidence="softmax_gap",model_name="tiny",policy="adaptive"',
        'fathom_policy_samples_total{confidence="softmax_gap"',
        "fathom_load_level{",
        "fathom_load_shifted_tokens_total{",
        "fathom_probes_total{",
    ):
        assert any(sorted_labels(row).startswith(line) for row in metrics.splitlines()), line


def sorted_labels(row: str) -> str:
    """A sample with its labels in order."""
    name, _, rest = row.partition("{")
    labels, _, value = rest.partition("}")
    return f"{name}{{{','.join(sorted(labels.split(',')))}}}{value}" if rest else row


def test_both_routes_need_a_key(client: TestClient) -> None:
    for route in ("/v1/exits", "/v1/operating_points"):
        answer = client.get(route, headers={"Authorization": "Bearer wrong"})
        assert answer.status_code == 401


def test_without_a_file_there_are_no_points(client: TestClient) -> None:
    assert client.get("/v1/operating_points").json() == {
        "object": "list", "data": [],
        "default": None, "since": None, "source": None, "digest": None, "can_roll_back": False,
    }  # fmt: skip


def test_points_are_listed_and_taken(engine: AsyncEngine, tokenizer: Tokenizer) -> None:
    points = points_of(engine.info)
    service = Service(
        backend=LocalBackend(engine, interval_s=0.0),
        tokenizer=tokenizer,
        model_name=MODEL,
        defaults=Defaults(compute=ComputePolicy(), timeout_s=60, points=points),
    )
    app = create_app(service, key_digests=[digest(KEY)], max_body_bytes=10_000)
    with TestClient(app, headers={"Authorization": f"Bearer {KEY}"}) as client:
        listed = client.get("/v1/operating_points").json()
        assert listed == {
            **points_body(points),
            "default": None, "since": None, "source": "points.yaml", "digest": points.digest,
            "can_roll_back": False,
        }  # fmt: skip
        by_name = {each["id"]: each for each in listed["data"]}
        assert by_name["fast"]["reasoning_effort"] == "low"
        assert by_name["fast"]["measured"]["budget"] == 0.7
        assert by_name["draft"]["compute"]["exit_threshold"] == 0.5
        assert listed["calibration"]["requests"] == 400

        def ask(**fields: object) -> dict[str, object]:
            body = {"model": MODEL, "prompt": "abc", "max_tokens": 20, "ignore_eos": True, **fields}
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            compute: dict[str, object] = answer.json()["usage"]["compute"]
            return compute

        low = ask(reasoning_effort="low")
        assert (low["operating_point"], low["requested_budget"]) == ("fast", 0.7)
        assert isinstance(low["realised_budget"], float)
        own = ask(compute={"budget": 0.8})
        assert (own["operating_point"], own["requested_budget"]) == ("", 0.8)
        risk = ask(compute={"risk": 0.05, "probe_rate": 1.0})
        assert risk["mode"] == "free"
        assert risk["exited"] == 0  # every exit was probed
        assert risk["requested_budget"] is None
        for compute, param in (
            ({"risk": 0.0001}, "compute.risk"),
            ({"budget": 0.3}, "compute.budget"),
            ({"operating_point": "none"}, "compute.operating_point"),
        ):
            body = {"model": MODEL, "prompt": "abc", "compute": compute}
            answer = client.post("/v1/completions", json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
