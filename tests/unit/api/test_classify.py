"""``POST /v1/classify`` over the real application and a real classifier, in process."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from fathom.api.app import create_app
from fathom.api.auth import digest
from fathom.api.classify import MAX_INPUTS, ClassifyRequest, job_of
from fathom.api.service import Service
from fathom.classification import ClassifierInfo, ClassifyJob, ClassifyResult
from fathom.engine.classifier import Classifier
from fathom.types import InvalidRequest
from tests.tiny_classifiers import save_classifier, texts
from tests.unit.api.conftest import KEY, MODEL


class InProcess:
    """A classifier behind the API without Ray."""

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier

    async def classify(self, job: ClassifyJob) -> ClassifyResult:
        (result,) = self._classifier.run([job])
        if isinstance(result, InvalidRequest):
            raise result
        return result

    async def classifier_info(self) -> ClassifierInfo:
        return self._classifier.info


@pytest.fixture(scope="module")
def http(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    torch.set_num_threads(1)
    folder: Path = save_classifier(tmp_path_factory.mktemp("classifier"), heldout=600)
    app = create_app(
        service,
        key_digests=[digest(KEY)],
        max_body_bytes=100_000,
        classifier=InProcess(Classifier.from_directory(folder)),
    )
    headers = {"Authorization": f"Bearer {KEY}"}
    with TestClient(app, headers=headers, raise_server_exceptions=False) as client:
        yield client


def test_one_text(http: TestClient) -> None:
    answer = http.post("/v1/classify", json={"model": "mood", "input": "good good film"})
    assert answer.status_code == 200
    body: dict[str, Any] = answer.json()
    assert body["id"].startswith("classify-") and body["object"] == "list"
    assert body["model"] == "mood" and body["created"] > 1.7e9
    (row,) = body["data"]
    assert row["index"] == 0 and row["num_classes"] == 2 and row["head"] == 3
    assert row["label"] == "praise" and sum(row["probs"]) == pytest.approx(1)
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (5, 0, 5)
    assert usage["compute"]["requested_budget"] is None
    assert usage["compute"]["realised_budget"] == 1
    assert usage["compute"]["flops"] == usage["compute"]["full_flops"]


def test_a_budget_is_told_beside_what_was_spent(http: TestClient) -> None:
    inputs = texts(400, seed=3)
    answer = http.post(
        "/v1/classify", json={"model": "mood", "input": inputs, "compute": {"budget": 0.5}}
    )
    body = answer.json()
    compute = body["usage"]["compute"]
    assert compute["requested_budget"] == 0.5
    assert compute["planned_budget"] == pytest.approx(0.5, abs=0.01)
    assert compute["realised_budget"] == pytest.approx(0.5, abs=0.06)
    assert sum(compute["heads"]) == 400
    assert [row["index"] for row in body["data"]] == list(range(400))
    assert compute["heads"] == [sum(r["head"] == m for r in body["data"]) for m in (1, 2, 3)]
    assert 0 < compute["flops"] < compute["full_flops"]


def test_models_are_listed_together(http: TestClient) -> None:
    cards = http.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == [MODEL, "mood"]
    card = http.get("/v1/models/mood").json()
    assert card["task"] == "classify" and card["labels"] == ["blame", "praise"]
    assert card["costs"][-1] == 1
    assert http.get("/v1/models/other").json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("change", "status", "param", "text"),
    [
        ({"model": "other"}, 404, "model", "does not exist"),
        ({"input": []}, 400, "input", f"from 1 to {MAX_INPUTS} inputs, got 0"),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, 400, "input", f"got {MAX_INPUTS + 1}"),
        ({"input": 5}, 400, "input", "string"),
        ({"compute": {"budget": 0.001}}, 400, "compute.budget", "which the first of 3 exit heads"),
        ({"compute": {"budget": 2.0}}, 400, "compute.budget", "got 2.0"),
        ({"compute": {"budget": "half"}}, 400, "compute.budget", "number"),
        ({"compute": {"mode": "exact"}}, 400, "compute.mode", "not permitted"),
    ],
)
def test_refusals(
    http: TestClient, change: dict[str, Any], status: int, param: str, text: str
) -> None:
    answer = http.post("/v1/classify", json={"model": "mood", "input": "good", **change})
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert error["param"] == param and text in error["message"]


def test_a_server_without_a_classifier_has_no_such_route(client: TestClient) -> None:
    answer = client.post("/v1/classify", json={"model": "mood", "input": "good"})
    assert answer.json()["error"]["code"] == "unknown_url"
    with TestClient(client.app) as stranger:
        assert stranger.post("/v1/classify", json={}).status_code == 401


def test_images_come_as_data_urls() -> None:
    info = ClassifierInfo(
        name="i", labels=("a", "b"), takes="image", costs=(0.5, 1.0), calibration_rows=1
    )
    good = "data:image/png;base64," + base64.b64encode(b"contents").decode()
    body = ClassifyRequest(model="i", input=[good, good])
    assert job_of(body, info).inputs == (b"contents", b"contents")
    for bad in ("http://x/y.png", "data:text/plain;base64,aa", "data:image/png;base64,@@", "cat"):
        with pytest.raises(InvalidRequest, match=r"input\[1\] must be an image as a data URL"):
            job_of(ClassifyRequest(model="i", input=[good, bad]), info)
