"""A classifier on a real Serve: batched across requests, budgets kept, a lost replica replaced."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray
from ray import serve

from deployments.app import build, run
from fathom.config import EngineConfig, ServeConfig
from fathom.models.errors import ModelError
from tests.ray_fixtures import TestServer
from tests.tiny_classifiers import save_classifier, texts
from tests.tiny_models import tiny_model

__all__ = ["tiny_model"]


@pytest.fixture(scope="module")
def http(
    server: TestServer, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    folder = save_classifier(tmp_path_factory.mktemp("classifier"))
    engine = EngineConfig(
        model=str(tiny_model), dtype="float32", exit_layer=2, adapter="none", kv_cache_bytes=4 << 20
    )
    config = ServeConfig(engine=engine, model_name="tiny", classifier=str(folder), drain_s=1)
    serve.run(build(config), name="classify", route_prefix="/classify")
    with httpx.Client(
        base_url=f"{server.url}/classify", headers=server.headers, timeout=120, trust_env=False
    ) as client:
        yield client
    serve.delete("classify")


def classify(http: httpx.Client, inputs: list[str], budget: float | None) -> dict[str, Any]:
    compute = {} if budget is None else {"compute": {"budget": budget}}
    answer = http.post("/v1/classify", json={"model": "mood", "input": inputs, **compute})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_a_folder_without_a_classifier_does_not_start(tiny_model: Path, tmp_path: Path) -> None:
    config = ServeConfig(engine=EngineConfig(model=str(tiny_model)), classifier=str(tmp_path))
    with pytest.raises(ModelError, match="no classifier here"):
        run(config, blocking=False)


def test_requests_at_once_each_keep_their_budget(http: httpx.Client) -> None:
    budgets: list[float | None] = [0.4, 0.55, 0.7, 0.9, None] * 4
    inputs = [texts(100, seed=seed) for seed in range(len(budgets))]
    with ThreadPoolExecutor(len(budgets)) as pool:
        bodies = list(pool.map(classify, [http] * len(budgets), inputs, budgets))
    for budget in dict.fromkeys(budgets):
        chosen = [body for body, b in zip(bodies, budgets, strict=True) if b == budget]
        pages = [body["usage"]["compute"] for body in chosen]
        assert {page["requested_budget"] for page in pages} == {budget}
        (planned,) = {page["planned_budget"] for page in pages}
        assert planned <= (1 if budget is None else budget + 0.005)
        realised = sum(page["realised_budget"] for page in pages) / len(pages)
        assert realised == pytest.approx(planned, abs=0.05)
    again = classify(http, inputs[0], budgets[0])
    assert [(r["label"], r["head"]) for r in again["data"]] == [
        (r["label"], r["head"]) for r in bodies[0]["data"]
    ]


def test_both_models_are_listed_and_served(http: httpx.Client) -> None:
    cards = http.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["tiny", "mood"]
    body = {"model": "tiny", "prompt": "ab", "max_tokens": 2, "ignore_eos": True}
    assert http.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 2


def test_metrics_count_inputs_by_head(server: TestServer, http: httpx.Client) -> None:
    metrics = TestServer(url=f"{server.url}/classify", model="mood").metrics

    before = metrics()
    answers = [classify(http, texts(40, seed=seed), 0.6) for seed in range(3)]
    after = metrics()
    grown = {name: after[name] - before.get(name, 0) for name in after if "classify" in name}
    assert grown["fathom_classify_inputs_total"] == 120
    assert grown["fathom_classify_request_seconds_count"] == 3
    pages = [answer["usage"]["compute"] for answer in answers]
    for name in ("flops", "full_flops"):
        assert grown[f"fathom_classify_{name}_total"] == pytest.approx(sum(p[name] for p in pages))
    heads = http.get("/metrics").text
    for head, inputs in enumerate(np.sum([page["heads"] for page in pages], axis=0), 1):
        assert not inputs or f'fathom_classify_inputs_total{{head="{head}"' in heads


def test_a_budget_that_cannot_be_kept_is_refused_with_the_smallest(http: httpx.Client) -> None:
    answer = http.post(
        "/v1/classify", json={"model": "mood", "input": "good", "compute": {"budget": 0.05}}
    )
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "compute.budget"
    smallest = http.get("/v1/models/mood").json()["costs"][0]
    assert f"must be from {smallest:.4g}" in error["message"]


def test_keys_are_asked_for(server: TestServer, http: httpx.Client) -> None:
    with httpx.Client(base_url=str(http.base_url), trust_env=False) as stranger:
        answer = stranger.post("/v1/classify", json={"model": "mood", "input": "good"})
    assert answer.status_code == 401


def test_a_killed_replica_is_replaced(http: httpx.Client) -> None:
    before = classify(http, ["good film", "bad bad plot"], 0.6)
    (actor,) = [
        actor
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["name"].startswith("SERVE_REPLICA::classify#Classifier")
    ]
    ray.kill(ray.get_actor(actor["name"], namespace="serve"))
    after = classify(http, ["good film", "bad bad plot"], 0.6)
    assert [r["label"] for r in after["data"]] == [r["label"] for r in before["data"]]
