"""Exit policies of several replicas, shared by a real actor."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray import serve

from deployments.policies import PolicyExchange, _find, stop_policies
from fathom.engine.build import build_engine
from fathom.exits.live import LivePolicies
from fathom.exits.meta import MetaClassifier
from fathom.types import AcceptMode, ComputePolicy, PolicyName
from tests.integration.apart import engine_settings, save_model
from tests.points import points_of
from tests.ray_fixtures import TestServer
from tests.tiny_models import tiny_model

__all__ = ["tiny_model"]

ADAPTIVE = ComputePolicy(mode=AcceptMode.FREE, policy=PolicyName.ADAPTIVE)
BUDGET = ComputePolicy(mode=AcceptMode.FREE, policy=PolicyName.BUDGET, budget=0.6)
APPLICATION = "policies-test"


class Seen:
    """The policies of an engine that makes no tokens; as an engine's thread, one at a time."""

    def __init__(self) -> None:
        self._policies = LivePolicies(0.4)
        self._lock = threading.Lock()

    def see(self, rows: int, alpha: float, beta: float, agreed: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        with self._lock:
            for _ in range(rows):
                confidence, agrees = float(rng.beta(alpha, beta)), bool(rng.random() < agreed)
                self._policies.observe(ADAPTIVE, confidence, agrees)

    def threshold(self, compute: ComputePolicy) -> float | None:
        with self._lock:
            return self._policies.threshold_for(compute, 0, 0)

    async def policies(self) -> dict[str, Any]:
        with self._lock:
            return self._policies.snapshot()

    async def merge_policies(self, others: Sequence[Mapping[str, Any]]) -> None:
        with self._lock:
            self._policies.merge(others)


@pytest.fixture
def pair(server: TestServer) -> Iterator[tuple[Seen, Seen]]:
    """Two engines that share; one is told of easy rows, the other of hard ones."""
    stop_policies(APPLICATION)
    one, other = Seen(), Seen()
    exchanges = [
        PolicyExchange(APPLICATION, name, "model", engine, period_s=0.1, silent_s=1.0)
        for name, engine in (("one", one), ("other", other))
    ]
    yield one, other
    for each in exchanges:
        each.close()
    stop_policies(APPLICATION)


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def agree(one: Seen, other: Seen) -> bool:
    found = [each.threshold(BUDGET) for each in (one, other)]
    return None not in found and found[0] == pytest.approx(found[1], abs=1e-6)


def test_two_that_see_different_halves_agree_with_one_that_sees_both(
    pair: tuple[Seen, Seen],
) -> None:
    one, other = pair
    alone = Seen()
    alone.see(400, 9, 1.2, 0.95, seed=1)
    for seed in range(50):  # neither is ever idle
        one.see(8, 9, 1.2, 0.95, seed=seed)
        other.see(8, 1.5, 3, 0.3, seed=1000 + seed)
        time.sleep(0.05)
    wait_until(lambda: agree(*pair))
    both = Seen()
    for seed in range(200):  # such rows in turns
        both.see(2, 9, 1.2, 0.95, seed=seed)
        both.see(2, 1.5, 3, 0.3, seed=1000 + seed)
    whole, shared = both.threshold(BUDGET), one.threshold(BUDGET)
    assert whole is not None
    assert shared is not None
    lone = alone.threshold(BUDGET)
    assert lone is not None
    assert abs(lone - shared) > 0.1
    assert shared == pytest.approx(whole, abs=0.1)
    assert one.threshold(ADAPTIVE) == other.threshold(ADAPTIVE)
    adaptive = one.threshold(ADAPTIVE), both.threshold(ADAPTIVE)
    assert adaptive[0] == pytest.approx(adaptive[1], abs=0.6 / 9 + 1e-9)


def test_a_lost_actor_is_replaced_and_nobody_waits_for_it(pair: tuple[Seen, Seen]) -> None:
    one, other = pair
    one.see(400, 9, 1.2, 0.95, seed=1)
    other.see(400, 1.5, 3, 0.3, seed=2)
    wait_until(lambda: agree(*pair))
    ray.kill(_find(APPLICATION), no_restart=False)  # Ray starts it anew
    one.see(400, 3, 3, 0.5, seed=3)
    wait_until(lambda: agree(*pair))
    stop_policies(APPLICATION)  # it is gone for good: another one takes its place
    other.see(400, 3, 3, 0.5, seed=4)
    wait_until(lambda: agree(*pair))
    assert ray.get(_find(APPLICATION).replicas.remote()) == 2


TOPOLOGIES = {
    "fused": {"num_replicas": 2, "cpus_per_replica": 0.5},
    "disaggregated": {
        "topology": "disaggregated",
        "shallow": {"num_replicas": 2, "cpus": 0.2},
        "deep": {"cpus": 0.2},
    },
}


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_replicas_of_an_application_share(
    server: TestServer, tiny_model: Path, tmp_path: Path, topology: str
) -> None:
    """Two replicas of one model; requests of one session go to one of them alone.

    The application has operating points and a meta classifier, and its requests name both.
    """
    from deployments.app import build

    model = save_model(tmp_path / "model", tiny_model)
    info = build_engine(engine_settings(model)).info
    points, meta = tmp_path / "points.yaml", tmp_path / "meta.safetensors"
    points_of(info).save(points)
    MetaClassifier(32).save(meta, info.weights_digest, {"adapter_digest": info.adapter_digest})
    application = build(
        {
            "engine": {
                "model": str(model), "dtype": "float32", "kv_cache_bytes": 8 << 20,
                "adapter": "none", "meta": str(meta), "pause_drafting": False,
            },
            "operating_points": str(points),
            "drain_s": 1,
            **TOPOLOGIES[topology],
        }
    )  # fmt: skip
    serve.run(application, name="sharing", route_prefix="/sharing")
    try:
        with TestServer(url=f"{server.url}/sharing", model=str(model)).http() as http:

            def complete(**compute: Any) -> dict[str, Any]:
                body = {
                    "model": str(model), "prompt": "abc", "max_tokens": 100, "ignore_eos": True,
                    "compute": compute,
                }  # fmt: skip
                answer = http.post("/v1/completions", json=body, headers={"X-Session-Id": "s"})
                assert answer.status_code == 200, answer.text
                return dict(answer.json()["usage"]["compute"])

            for _ in range(3):
                complete(mode="free", policy="adaptive")
            for name in ("exact", "balanced", "fast"):
                assert complete(operating_point=name)["operating_point"] == name
            assert complete(mode="free", confidence="meta", exit_threshold=0.4)["mode"] == "free"

            def states() -> list[dict[str, Any]]:
                return list(http.get("/v1/exits").raise_for_status().json()["replicas"])

            assert len(states()) == 2
            assert sum(bool(each["measures"]) for each in states()) >= 1
            # Both know every measure, also the one that has run nothing.
            measures = {"softmax_gap", "softmax_gap@1.25", "meta"}
            wait_until(lambda: all(set(each["measures"]) == measures for each in states()))
            found = http.get("/v1/exits").json()
            rows = [sum(s["measures"]["softmax_gap"]["rows"].values()) for s in found["replicas"]]
            assert sum(found["merged"]["measures"]["softmax_gap"]["rows"].values()) == sum(rows)
            assert sum(rows) >= 250
            assert found["merged"]["engines"] == 2
    finally:
        serve.delete("sharing")


def test_points_of_another_model_do_not_start(
    server: TestServer, tiny_model: Path, tmp_path: Path
) -> None:
    from deployments.app import build

    model = save_model(tmp_path / "model", tiny_model)
    settings = engine_settings(model)
    other = points_of(build_engine(settings).info)
    path = tmp_path / "points.yaml"
    points_of().save(path)
    application = build(
        {
            "engine": {
                "model": str(model), "dtype": "float32", "kv_cache_bytes": 8 << 20,
                "adapter": "none",
            },
            "operating_points": str(path),
            "cpus_per_replica": 0.5,
        }
    )  # fmt: skip
    try:
        with pytest.raises(RuntimeError):
            serve.run(application, name="wrong", route_prefix="/wrong")
        status = serve.status().applications["wrong"]
        words = " ".join(each.message for each in status.deployments.values())
        assert "measured on another model" in words
        assert f"weights_digest {points_of().identity.weights_digest}" in words
        assert other.identity.weights_digest in words
    finally:
        serve.delete("wrong")
