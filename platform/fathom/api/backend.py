"""What the API needs from whatever runs requests: one engine in process, or replicas on a cluster.

The API knows no Ray. ``deployments`` supplies a backend over Serve handles; a plain process can
use ``LocalBackend``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fathom.types import Request, RequestOutput


class QueueFull(RuntimeError):
    """Every replica is at its limit and the queue before them is full; try again later.

    Attributes:
        retry_after_s: whole seconds after which another try makes sense.
    """

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class BackendUnavailable(RuntimeError):
    """No engine can answer: none is up yet, or the one at work has died."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What the API must know of the model to check requests.

    Attributes:
        num_layers: L. exit_layer: k. exit_depth: layers behind a token that left early, which is
            more than k where an adapter has exit layers.
        max_model_len: longest prompt + completion, in tokens.
        weights_digest: identifies the weights; the ``system_fingerprint`` of responses.
    """

    num_layers: int
    exit_layer: int
    vocab_size: int
    max_model_len: int
    weights_digest: str = ""
    exit_depth: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReport:
    """One replica's word about itself.

    Attributes:
        replica: its name, unique within the server.
        stats: ``engine.stats()``.
    """

    replica: str
    info: ModelInfo
    stats: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitState:
    """What one replica's exit policies have seen.

    Attributes:
        replica: its name, as in its report.
        state: ``LivePolicies.snapshot``, with ``group``, equal where confidences mean the same
            (see ``exits.cluster``), and ``load_level``.
    """

    replica: str
    state: Mapping[str, Any]


class Backend(Protocol):
    """Runs requests somewhere."""

    def generate(self, request: Request) -> AsyncIterator[list[RequestOutput]]:
        """Run a request.

        Yields:
            Non-empty lists with at most one output a completion; the first as soon as a token
            exists. Closing the iterator early cancels the request and frees its KV blocks.

        Raises:
            InvalidRequest, QueueFull, BackendUnavailable: all of them while iterating.
        """
        ...

    async def reports(self) -> Sequence[ReplicaReport]:
        """The reports of all replicas that answer; empty when none does."""
        ...

    async def exit_states(self) -> Sequence[ExitState]:
        """What the exit policies of all replicas that answer have seen."""
        ...
