"""The ingress: OpenAI's protocol over HTTP, in front of the replicas. Loads no weights."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.handle_backend import HandleBackend
from deployments.journal import RayJournal
from deployments.shared import end_if_deleted
from fathom.api.app import create_app
from fathom.api.convert import Defaults
from fathom.api.service import Service
from fathom.config import ServeConfig
from fathom.models.resolve import resolve_model
from fathom.models.tokenizer import load_tokenizer


class Ingress:
    """Checks and tokenizes requests, and streams answers. Undecorated: see ``app.build``.

    It can die and be replaced: what its clients have been sent is in the application's journal.

    Args:
        engine: handle of the replicas.
        key_digests: of the API keys; a key itself never reaches Ray.

    Raises:
        ModelError: if the tokenizer cannot be loaded.
    """

    def __init__(
        self, engine: DeploymentHandle, config: ServeConfig, key_digests: Sequence[bytes]
    ) -> None:
        self._journal = None
        if config.keep_streams_s > 0:
            application = serve.get_replica_context().app_name
            self._journal = RayJournal(application, keep_s=config.keep_streams_s)
        backend = HandleBackend(engine, limit=config.max_requests)
        self._service = Service(
            backend=backend,
            tokenizer=load_tokenizer(resolve_model(config.engine.model)),
            model_name=config.model_name or config.engine.model,
            defaults=Defaults(compute=config.engine.compute, timeout_s=config.request_timeout_s),
            journal=self._journal,
            keep_streams_s=config.keep_streams_s,
            isolate_tenants=config.isolate_tenants,
        )
        backend.on_resumption = self._service.metrics.resumptions.inc
        self._key_digests = tuple(key_digests)
        self._max_body_bytes = config.max_body_bytes

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor."""
        return create_app(
            self._service,
            key_digests=self._key_digests,
            max_body_bytes=self._max_body_bytes,
            echo_request_id=False,  # Serve's proxy does
        )

    async def __del__(self) -> None:
        # Serve calls this after it has let the streams under way finish.
        journal = getattr(self, "_journal", None)
        if journal is not None:
            journal.close()
            await asyncio.to_thread(end_if_deleted, journal.application)
