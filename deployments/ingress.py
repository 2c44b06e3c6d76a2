"""The ingress: OpenAI's protocol over HTTP, in front of the replicas. Loads no weights."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from prometheus_client import Metric
from ray import serve
from ray._private.services import get_webui_url_from_internal_kv
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.classify import HandleClassifier
from deployments.handle_backend import REPORT_TIMEOUT_S, HandleBackend
from deployments.journal import RayJournal
from deployments.shadow import ShadowDesk
from deployments.shared import end_if_deleted
from deployments.takeover import ServeTakeover
from fathom.api.app import create_app
from fathom.api.convert import Defaults
from fathom.api.promotion import promoted_of
from fathom.api.service import Service
from fathom.config import ServeConfig
from fathom.exits.drift import Expected
from fathom.models.resolve import resolve_model
from fathom.models.tokenizer import load_tokenizer
from fathom.observability.tracing import Tracing
from fathom.tuning.expected import expectations
from fathom.tuning.operating_points import OperatingPoints


class Ingress:
    """Checks and tokenizes requests, and streams answers. Undecorated: see ``app.build``.

    It can die and be replaced: what its clients have been sent is in the application's journal.

    Args:
        engine: handle of the replicas.
        key_digests: of the API keys; a key itself never reaches Ray.
        classifier: handle of its replicas, if one is served.
        points: the operating points that requests can name, if there are any.
        operator_digests: of the operators' keys; with any, they alone may promote.

    Raises:
        ModelError: if the tokenizer cannot be loaded.
    """

    def __init__(
        self,
        engine: DeploymentHandle,
        config: ServeConfig,
        key_digests: Sequence[bytes],
        classifier: DeploymentHandle | None = None,
        points: OperatingPoints | None = None,
        operator_digests: Sequence[bytes] = (),
    ) -> None:
        self._siblings = None
        if config.num_ingress_replicas > 1:
            context = serve.get_replica_context()
            self._name: str = context.replica_id.unique_id
            self._siblings = serve.get_deployment_handle(context.deployment, context.app_name)
        self._journal = None
        if config.keep_streams_s > 0:
            application = serve.get_replica_context().app_name
            self._journal = RayJournal(application, keep_s=config.keep_streams_s)
        backend = HandleBackend(engine, limit=config.max_requests)
        self._service = Service(
            backend=backend,
            tokenizer=load_tokenizer(resolve_model(config.engine.model)),
            model_name=config.model_name or config.engine.model,
            defaults=Defaults(
                compute=config.engine.compute, timeout_s=config.request_timeout_s, points=points
            ),
            journal=self._journal,
            keep_streams_s=config.keep_streams_s,
            isolate_tenants=config.isolate_tenants,
        )
        backend.on_resumption = self._service.metrics.resumptions.inc
        self._classifier = None
        if classifier is not None:
            self._classifier = HandleClassifier(classifier, limit=config.max_requests)
        self._takeover = ServeTakeover(engine, config.engine.compute)
        self._tracing = None
        if config.otlp_traces_endpoint:
            name = serve.get_replica_context().replica_id.unique_id
            self._tracing = Tracing(config.otlp_traces_endpoint, instance=name)
            self._service.trace(self._tracing)
        self._shadow = None
        if config.shadow.rate:
            application = serve.get_replica_context().app_name
            self._shadow = ShadowDesk(application, config, self._expected)
            self._service.shadow = self._shadow.state
        self._key_digests = tuple(key_digests)
        self._operator_digests = tuple(operator_digests)
        self._max_body_bytes = config.max_body_bytes
        self._mlflow = config.mlflow

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor."""
        return create_app(
            self._service,
            key_digests=self._key_digests,
            operator_digests=self._operator_digests,
            max_body_bytes=self._max_body_bytes,
            echo_request_id=False,  # Serve's proxy does
            all_metrics=self._all_metrics if self._siblings else None,
            classifier=self._classifier,
            takeover=self._takeover,
            mlflow=self._mlflow,
            links=_links(),
        )

    def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Called by Serve, at the start and after each promotion; see ``deployments.takeover``."""
        self._service.take(promoted_of(user_config))

    def points_revision(self) -> str:
        """``Promoted.revision`` of the points that are at hand here."""
        return self._service.promoted.revision

    def _expected(self) -> Mapping[str, Expected]:
        return expectations(self._service.points, self._service.default_compute)

    def measured(self) -> tuple[str, list[Metric]]:
        """This ingress's name, and what it has measured."""
        return self._name, self._service.metrics.collect()

    async def _all_metrics(self) -> Mapping[str, Sequence[Metric]]:
        """What every ingress has measured; those that do not answer are left out."""
        assert self._siblings is not None
        found = dict([self.measured()])
        with contextlib.suppress(TimeoutError, RayActorError, DeploymentUnavailableError):
            answers = await self._siblings.broadcast("measured").results_async(
                timeout_s=REPORT_TIMEOUT_S, return_exceptions=True
            )
            found |= dict(each for each in answers if not isinstance(each, BaseException))
        return found

    async def __del__(self) -> None:
        # Serve calls this after it has let the streams under way finish.
        tracing = getattr(self, "_tracing", None)
        if tracing is not None:
            await asyncio.to_thread(tracing.close)
        shadow = getattr(self, "_shadow", None)
        if shadow is not None:
            shadow.close()
        journal = getattr(self, "_journal", None)
        if journal is not None:
            journal.close()
            await asyncio.to_thread(end_if_deleted, journal.application)


def _links() -> dict[str, str]:
    """Pages of the cluster that the dashboard links to: none where Ray was started without."""
    address = get_webui_url_from_internal_kv()  # type: ignore[no-untyped-call]
    return {"Ray dashboard": f"http://{address}"} if address else {}
