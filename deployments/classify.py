"""A classifier's replicas behind the ingress, batched by Serve across requests."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle

from deployments.handle_backend import LOSSES, RETRY_AFTER_S
from fathom.api.backend import BackendUnavailable, QueueFull
from fathom.classification import ClassifierInfo, ClassifyJob, ClassifyResult
from fathom.types import InvalidRequest

BATCH_REQUESTS = 64
BATCH_WAIT_S = 0.002
_ATTEMPTS = 3


class ClassifierReplica:
    """Serves one classifier. Undecorated: ``app.build`` makes it a deployment.

    Args:
        folder: of the classifier, as this replica's machine sees it. threads: torch's.

    Raises:
        ModelError: if there is no classifier.
    """

    def __init__(self, folder: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)

        from fathom.engine.classifier import Classifier

        self._classifier = Classifier.from_directory(Path(folder))

    def info(self) -> ClassifierInfo:
        """What is served."""
        return self._classifier.info

    @serve.batch(max_batch_size=BATCH_REQUESTS, batch_wait_timeout_s=BATCH_WAIT_S)
    async def classify(self, jobs: list[ClassifyJob]) -> list[ClassifyResult | InvalidRequest]:
        """Run the requests that came together; each may have a budget of its own.

        An invalid request is an item, not an exception, which would fail the others too.
        """
        return await asyncio.to_thread(self._classifier.run, jobs)


class HandleClassifier:
    """The API's classifier over a Serve handle; see ``fathom.api.classify.ClassifierBackend``.

    Args:
        limit: requests under way at once; more are refused.
    """

    def __init__(self, handle: DeploymentHandle, *, limit: int) -> None:
        self._handle: Any = handle
        self._limit = limit
        self._live = 0
        self._info: ClassifierInfo | None = None

    async def classify(self, job: ClassifyJob) -> ClassifyResult:
        """Run a request; one whose replica is lost is run again at another."""
        if self._live >= self._limit:
            raise QueueFull(
                f"The classifier has {self._live} requests under way, its limit; try again later.",
                retry_after_s=RETRY_AFTER_S,
            )
        self._live += 1
        try:
            found = await self._call("classify", job)
        finally:
            self._live -= 1
        if isinstance(found, InvalidRequest):
            raise found
        assert isinstance(found, ClassifyResult)
        return found

    async def classifier_info(self) -> ClassifierInfo:
        """What is served; asked for once."""
        if self._info is None:
            found = await self._call("info")
            assert isinstance(found, ClassifierInfo)
            self._info = found
        return self._info

    async def _call(self, method: str, *arguments: Any) -> Any:
        """Call a replica: a classification has no effects, so it can be run again.

        Raises:
            BackendUnavailable: if replica after replica is lost.
        """
        reason = ""
        for _ in range(_ATTEMPTS):
            try:
                return await getattr(self._handle, method).remote(*arguments)
            except RayTaskError:
                raise
            except LOSSES as error:
                reason = str(error).partition("\n")[0].rstrip(".")
        raise BackendUnavailable(f"The classifier was lost: {reason}. Try again in a few seconds.")
