"""Settings of a server: frozen dataclasses, checked once, readable from YAML."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fathom.engine.config import DEFAULT_MODEL, DTYPES, EngineConfig
from fathom.engine.flush_rules import FlushWhen
from fathom.exits.load import LoadConfig
from fathom.exits.shadow import ShadowConfig
from fathom.pools import (
    DataPlaneConfig,
    DeepConfig,
    KVStoreConfig,
    Placement,
    PoolConfig,
    Router,
    Topology,
    leases_of,
)
from fathom.routing.policy import RoutingConfig
from fathom.settings import (
    ConfigError,
    check_above_zero,
    check_at_least,
    from_mapping,
    load_yaml,
)
from fathom.types import AcceptMode, ComputePolicy
from fathom.vllm.settings import VllmConfig

__all__ = [
    "DEFAULT_MODEL",
    "DTYPES",
    "SCHEME",
    "ConfigError",
    "DataPlaneConfig",
    "DeepConfig",
    "EngineConfig",
    "FlushWhen",
    "KVStoreConfig",
    "LoadConfig",
    "Placement",
    "PoolConfig",
    "Router",
    "RoutingConfig",
    "ServeConfig",
    "ShadowConfig",
    "Topology",
    "VllmConfig",
    "from_mapping",
    "load_yaml",
]

SCHEME = "models:/"
"""What names of operating points in the MLflow Model Registry begin with (``tuning.registry``)."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """One server: an HTTP ingress in front of engine replicas.

    API keys are never part of a file: they come from ``FATHOM_API_KEY`` (several, separated by
    commas).

    Attributes:
        engine: what each replica runs.
        model_name: the name clients ask for; empty takes ``engine.model``.
        classifier: folder of a classifier to serve beside it under ``/v1/classify``; empty for
            none. Its replicas must see it under this path.
        operating_points: file of operating points (``fathom calibrate fit``) that requests, and
            ``engine.compute``, can name; empty for none. Or, with ``mlflow``, a version of the
            registry, ``models:/NAME@production`` or ``models:/NAME/VERSION``: the point that was
            promoted is then what requests get, unless ``engine.compute`` says something. It is
            read where the application is built, and replicas start only if it was measured on what
            they run.
        load_aware: under pressure, replicas take cheaper settings where requests allow it; off
            unless ``enabled``.
        mlflow: MLflow tracking server, for studies, the registry of operating points, and what the
            shadow finds; empty for none. Every node must reach it.
        shadow: a share of the completions is compared with the full model; off unless its ``rate``
            is above 0.
        otlp_traces_endpoint: URL that traces of requests go to, by OTLP over HTTP
            (``http://localhost:4318/v1/traces``); ``env`` takes OpenTelemetry's own variables
            where the application is built, as ``OTEL_EXPORTER_OTLP_ENDPOINT``; empty traces
            nothing.
        host, port: where HTTP binds. Without an API key only loopback addresses are allowed.
        num_ingress_replicas: processes that speak HTTP's side. Figures of requests in ``/metrics``
            are then one series each.
        topology: ``fused``, or ``disaggregated``: shallow and deep replicas apart; or ``vllm``:
            replicas of vLLM, all layers at every token. Those know mode ``full`` alone, which is
            what requests get where ``engine.compute`` says nothing.
        num_replicas: fused replicas (shallow and deep stage in one process), or vLLM's.
        cpus_per_replica: CPU cores of one of these, which is also its thread count.
        vllm: what vLLM's replicas need beside ``engine``.
        shallow, deep: the pools of the disaggregated topology.
        placement: where deep replicas are placed.
        kv_store: the KV blocks that replicas share.
        data_plane: the way of a flush.
        router: how requests get to replicas. routing: settings of ``router: prefix``.
        max_ongoing_requests, max_queued_requests: the server takes ``max_ongoing_requests`` for
            each fused or shallow replica, and ``max_queued_requests`` more, at once, running and
            waiting; further ones are answered 429.
        request_timeout_s: deadline of a request that sets none.
        drain_s: seconds that a stopping replica lets its requests finish.
        surge_percent: replicas that an update of a running application may start beyond their
            number, so that none is missing meanwhile, at least one a kind; they need cores. 0
            stops old replicas before it starts new ones; requests wait for those.
        stream_interval_s: a stream's first token leaves at once; afterwards tokens that come
            within this many seconds travel together, or within more where many streams run: a
            replica sends at most 200 pieces a second. 0 sends each engine step's at once.
        keep_streams_s: seconds for which a stream whose connection broke is kept, so that its
            client can have the rest. Until then, prompts and answers are in the memory of the
            journal's process. 0 keeps none, and streams' events carry no ids.
        isolate_tenants: requests with different API keys never share KV blocks, so that no tenant
            can tell from its latencies what others ask. A prefix that they have in common is
            computed once for each.
        max_body_bytes: largest request body.
        startup_timeout_s: seconds that a replica may take to load its model.
    """

    engine: EngineConfig = field(default_factory=EngineConfig)
    model_name: str = ""
    classifier: str = ""
    operating_points: str = ""
    load_aware: LoadConfig = field(default_factory=LoadConfig)
    mlflow: str = ""
    shadow: ShadowConfig = field(default_factory=ShadowConfig)
    otlp_traces_endpoint: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    num_ingress_replicas: int = 1
    topology: Topology = Topology.FUSED
    num_replicas: int = 1
    cpus_per_replica: float = 1
    shallow: PoolConfig = field(default_factory=PoolConfig)
    deep: DeepConfig = field(default_factory=DeepConfig)
    placement: Placement = Placement.SPREAD
    vllm: VllmConfig = field(default_factory=VllmConfig)
    kv_store: KVStoreConfig = field(default_factory=KVStoreConfig)
    data_plane: DataPlaneConfig = field(default_factory=DataPlaneConfig)
    router: Router = Router.PREFIX
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    max_ongoing_requests: int = 256
    max_queued_requests: int = 1024
    request_timeout_s: float = 600.0
    drain_s: float = 20.0
    surge_percent: int = 25
    stream_interval_s: float = 0.02
    keep_streams_s: float = 60.0
    isolate_tenants: bool = False
    max_body_bytes: int = 8 << 20
    startup_timeout_s: float = 600.0

    @property
    def serving(self) -> PoolConfig:
        """The pool behind the ingress: fused replicas, shallow ones, or vLLM's."""
        if self.topology is Topology.DISAGGREGATED:
            return self.shallow
        return PoolConfig(num_replicas=self.num_replicas, cpus=self.cpus_per_replica)

    @property
    def max_requests(self) -> int:
        """Requests that one ingress takes at once."""
        total = self.serving.most * self.max_ongoing_requests + self.max_queued_requests
        return math.ceil(total / self.num_ingress_replicas)

    @property
    def store_shards(self) -> int:
        """Shards of the shared KV store; 0 for none."""
        if self.topology is Topology.VLLM:
            return 0
        if self.kv_store.shards >= 0:
            return self.kv_store.shards
        shared = self.topology is Topology.DISAGGREGATED or self.num_replicas > 1
        return 2 if shared else 0

    @property
    def leases(self) -> int:
        """Shallow replicas that each deep replica can hold KV blocks for."""
        surge = math.ceil(self.shallow.most * self.surge_percent / 100)
        return leases_of(self.deep, self.shallow, self.placement, surge)

    def validate(self) -> None:
        """Check every field, the engine's included.

        Raises:
            ConfigError: naming the first field out of range, its value and the remedy.
        """
        self.engine.validate()
        if not 1 <= self.port <= 65535:
            raise ConfigError(f"port must be from 1 to 65535, got {self.port!r}.")
        check_above_zero(
            self,
            (
                "num_ingress_replicas",
                "num_replicas",
                "cpus_per_replica",
                "max_ongoing_requests",
                "max_queued_requests",
                "request_timeout_s",
                "max_body_bytes",
                "startup_timeout_s",
            ),
        )
        check_at_least(self, ("drain_s", "surge_percent", "stream_interval_s", "keep_streams_s"), 0)
        if self.surge_percent > 100:
            raise ConfigError(f"surge_percent must be at most 100, got {self.surge_percent!r}.")
        self.shallow.validate("shallow.")
        self.deep.validate("deep.")
        self.kv_store.validate("kv_store.")
        self.data_plane.validate("data_plane.")
        self.routing.validate()
        self.load_aware.validate("load_aware.")
        self.shadow.validate("shadow.")
        self.vllm.validate("vllm.")
        if self.topology is Topology.VLLM:
            self._check_full_depth()
        url = self.otlp_traces_endpoint
        if url and url != "env" and not url.startswith(("http://", "https://")):
            raise ConfigError(
                "otlp_traces_endpoint must be a URL of OTLP over HTTP, as "
                f"http://localhost:4318/v1/traces, or env, got {url!r}."
            )
        if self.placement is Placement.BESIDE and self.deep.max_replicas:
            raise ConfigError(
                "deep.max_replicas must be 0 with placement: beside, where every shallow replica "
                f"has a deep one of its own, got {self.deep.max_replicas}."
            )

    def _check_full_depth(self) -> None:
        """Check that nothing is asked for that vLLM's replicas do not have.

        Raises:
            ConfigError: naming the first such field, its value and the remedy.
        """
        engine, plain = self.engine, EngineConfig()
        if engine.compute != ComputePolicy() and engine.compute.mode is not AcceptMode.FULL:
            raise ConfigError(
                "engine.compute.mode must be full with topology vllm, whose replicas run all "
                f"layers at every token, got {engine.compute.mode.value!r}: leave engine.compute "
                "out, or take topology fused or disaggregated."
            )
        of_engine = ("quantization", "adapter", "exit_layer", "exit_vocab", "meta")
        others = (
            ("operating_points", self.operating_points, ""),
            ("load_aware.enabled", self.load_aware.enabled, False),
            ("shadow.rate", self.shadow.rate, 0),
            ("kv_store.shards", max(0, self.kv_store.shards), 0),
        )
        asked = [
            (f"engine.{name}", getattr(engine, name), getattr(plain, name)) for name in of_engine
        ]
        for name, value, none in (*asked, *others):
            if value != none and (name, value) != ("engine.adapter", "none"):
                raise ConfigError(
                    f"{name} must be {none!r} with topology vllm, whose replicas have no exits and "
                    f"no shared KV store, got {value!r}: leave it out, or take topology fused or "
                    "disaggregated."
                )
