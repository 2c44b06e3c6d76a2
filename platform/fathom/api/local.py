"""A backend over one engine in this process: what a replica serves, and plain processes use."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any, Protocol

from fathom.api.backend import BackendUnavailable, ExitState, ModelInfo, ReplicaReport
from fathom.api.coalesce import coalesce
from fathom.types import InvalidRequest, Request, RequestOutput

MAX_PIECES_A_SECOND = 200
"""Pieces that leave one engine. Each costs about a millisecond on its way through Serve and the
ingress, whatever is in it: at 16 streams a token at a time would take half of a core."""


class Engine(Protocol):
    """What is used of ``fathom.engine.async_engine.AsyncEngine``."""

    info: Any

    def generate(self, request: Request) -> AsyncIterator[RequestOutput]: ...

    def stats(self) -> Mapping[str, float]: ...

    def check_health(self) -> None: ...

    async def policies(self) -> Mapping[str, Any]: ...


class LocalBackend:
    """See ``Backend``.

    Args:
        name: this engine's name in metrics.
        interval_s: seconds between two pieces of a request's output, after the first piece; more
            where so many requests run that their pieces would come too fast.
    """

    def __init__(self, engine: Engine, *, name: str = "local", interval_s: float = 0.02) -> None:
        self._engine = engine
        self._name = name
        self._interval_s = interval_s
        self._live = 0

    async def generate(self, request: Request) -> AsyncGenerator[list[RequestOutput], None]:
        """See ``Backend.generate``."""
        self._live += 1
        try:
            pieces = coalesce(self._engine.generate(request), self._interval)
            async with aclosing(pieces) as batches:
                async for batch in batches:
                    yield batch
        except InvalidRequest:
            raise
        except Exception as error:
            try:
                self._engine.check_health()
            except Exception as cause:
                raise BackendUnavailable(f"The engine has stopped: {cause}") from cause
            raise error
        finally:
            self._live -= 1

    def _interval(self) -> float:
        return max(self._interval_s, self._live / MAX_PIECES_A_SECOND) if self._interval_s else 0.0

    def report(self) -> ReplicaReport:
        """The engine's figures.

        Raises:
            BackendUnavailable: if the engine has died.
        """
        try:
            self._engine.check_health()
        except Exception as cause:
            raise BackendUnavailable(f"The engine has stopped: {cause}") from cause
        info = self._engine.info
        return ReplicaReport(
            replica=self._name,
            info=ModelInfo(
                num_layers=info.num_layers,
                exit_layer=info.exit_layer,
                exit_depth=info.exit_depth,
                vocab_size=info.vocab_size,
                max_model_len=info.max_model_len,
                weights_digest=info.weights_digest,
            ),
            stats=dict(self._engine.stats()),
        )

    async def exit_state(self) -> ExitState:
        """What the engine's exit policies have seen.

        Raises:
            BackendUnavailable: if the engine has died.
        """
        report = self.report()
        try:
            seen = await self._engine.policies()
        except RuntimeError as cause:
            raise BackendUnavailable(f"The engine has stopped: {cause}") from cause
        state = {
            "group": self._engine.info.exit_identity,
            "load_level": report.stats.get("load_level", 0),
            **seen,
        }
        return ExitState(replica=self._name, state=state)

    async def exit_states(self) -> list[ExitState]:
        """See ``Backend.exit_states``."""
        try:
            return [await self.exit_state()]
        except BackendUnavailable:
            return []

    async def reports(self) -> list[ReplicaReport]:
        """See ``Backend.reports``."""
        try:
            return [self.report()]
        except BackendUnavailable:
            return []
