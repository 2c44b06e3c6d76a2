"""``POST /v1/classify``: vLLM's request and response, with a budget for the compute."""

from __future__ import annotations

import base64
import binascii
import time
import uuid
from collections import Counter
from typing import Any, Protocol

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from fathom.api.errors import model_not_found
from fathom.api.schemas import Model, Text
from fathom.classification import ClassifierInfo, ClassifyJob, ClassifyResult
from fathom.observability.classifier_metrics import ClassifierMetrics
from fathom.types import InvalidRequest

MAX_INPUTS = 1024
"""Of one request."""


class ClassifyCompute(BaseModel):
    """How much depth this request's inputs get."""

    model_config = ConfigDict(strict=True, extra="forbid")

    budget: float | None = Field(
        None,
        description="The most that an input may cost in the mean, as a share of the full model's "
        "compute: at least what the first exit head costs, at most 1. Without it every input runs "
        "through the whole model.",
    )


class ClassifyRequest(Model):
    """``POST /v1/classify``."""

    model: Text
    input: Text | list[Text] = Field(
        description="A text or several; for a classifier of images `data:image/...;base64,...` "
        "URLs of image files."
    )
    user: Text | None = None
    # ours
    compute: ClassifyCompute | None = Field(None, description="Depth of this request's inputs.")


class ClassifierBackend(Protocol):
    """Classifies somewhere."""

    async def classify(self, job: ClassifyJob) -> ClassifyResult:
        """Run a request.

        Raises:
            InvalidRequest, QueueFull, BackendUnavailable.
        """
        ...

    async def classifier_info(self) -> ClassifierInfo:
        """What is served.

        Raises:
            BackendUnavailable: if no replica has answered yet.
        """
        ...


def add_classify_route(
    app: FastAPI, backend: ClassifierBackend, metrics: ClassifierMetrics
) -> None:
    """Serve a classifier under ``/v1/classify``."""

    @app.post("/v1/classify", response_model=None)
    async def classify(body: ClassifyRequest) -> dict[str, Any]:
        start = time.perf_counter()
        info = await backend.classifier_info()
        if body.model != info.name:
            raise model_not_found(body.model)
        result = await backend.classify(job_of(body, info))
        metrics.answered(info.name, result, time.perf_counter() - start)
        return response_body(info, result)


def classifier_card(info: ClassifierInfo, created: int) -> dict[str, Any]:
    """The classifier's entry in ``GET /v1/models``."""
    return {
        "id": info.name,
        "object": "model",
        "created": created,
        "owned_by": "fathom",
        "task": "classify",
        "takes": info.takes,
        "labels": list(info.labels),
        "costs": list(info.costs),
    }


def job_of(body: ClassifyRequest, info: ClassifierInfo) -> ClassifyJob:
    """The job that a request's body asks for.

    Raises:
        InvalidRequest: for no inputs or too many, or one that is no data URL where images are
            taken. Budgets are checked where thresholds are worked out.
    """
    inputs = [body.input] if isinstance(body.input, str) else body.input
    if not 1 <= len(inputs) <= MAX_INPUTS:
        raise InvalidRequest(
            f"input must hold from 1 to {MAX_INPUTS} inputs, got {len(inputs)}.", param="input"
        )
    budget = body.compute.budget if body.compute else None
    if info.takes == "text":
        return ClassifyJob(inputs=tuple(inputs), budget=budget)
    images = tuple(_image(text, place) for place, text in enumerate(inputs))
    return ClassifyJob(inputs=images, budget=budget)


def _image(url: str, place: int) -> bytes:
    head, comma, data = url.partition(",")
    try:
        if comma and head.startswith("data:image/") and head.endswith(";base64"):
            return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        pass
    raise InvalidRequest(
        f"input[{place}] must be an image as a data URL, data:image/jpeg;base64,..., got "
        f"{url[:40]!r}.",
        param=f"input[{place}]",
    )


def response_body(info: ClassifierInfo, result: ClassifyResult) -> dict[str, Any]:
    """The response; ``usage.compute`` has the realised budget beside the requested one."""
    tokens = sum(row.tokens for row in result.rows)
    heads = Counter(row.head for row in result.rows)
    return {
        "id": f"classify-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": info.name,
        "data": [
            {
                "index": index,
                "label": info.labels[row.label],
                "probs": list(row.probs),
                "num_classes": len(row.probs),
                "head": row.head,
            }
            for index, row in enumerate(result.rows)
        ],
        "usage": {
            "prompt_tokens": tokens,
            "completion_tokens": 0,
            "total_tokens": tokens,
            "compute": {
                "requested_budget": result.requested_budget,
                "planned_budget": result.planned_budget,
                "realised_budget": result.realised_budget,
                "flops": result.flops,
                "full_flops": result.full_flops,
                "heads": [heads[m] for m in range(1, len(info.costs) + 1)],
            },
        },
    }
