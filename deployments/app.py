"""The application: ``build`` for ``serve deploy`` and ``serve run``, ``run`` for one machine."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

from deployments.autoscaling import ByQueue, ByRequests
from deployments.classify import ClassifierReplica
from deployments.cluster import CLASSIFIER_CPUS, Server, start
from deployments.deep import DeepReplica
from deployments.ingress import Ingress
from deployments.replica import FusedReplica
from deployments.router import ROUTER
from deployments.shallow import ShallowReplica
from deployments.vllm_replica import VllmReplica
from fathom.api.auth import (
    check_bind,
    check_operators,
    digests_from_env,
    operator_digests_from_env,
)
from fathom.api.compute import resolve_default
from fathom.api.promotion import Promoted
from fathom.config import (
    SCHEME,
    ConfigError,
    Placement,
    PoolConfig,
    Router,
    ServeConfig,
    Topology,
    from_mapping,
)
from fathom.observability.tracing import endpoint_of
from fathom.tuning.operating_points import OperatingPoints, load
from fathom.types import AcceptMode, ComputePolicy

INGRESS, FUSED, SHALLOW, DEEP, CLASSIFIER = "Ingress", "Engine", "Shallow", "Deep", "Classifier"
VLLM = "Vllm"
"""Names of the deployments."""

# The ingress counts requests (see HandleBackend); Serve's own limits, of 5 by default, must never
# be what a request meets.
UNLIMITED = 1_000_000
AS_STARTED: Mapping[str, Any] = Promoted().as_dict()
"""``user_config`` of a server on which nothing was promoted. Serve tells a replica nothing of one
that is None, so a file deployed anew could not take a promotion back."""
INGRESS_CPUS = 0.1


def build(config: ServeConfig | Mapping[str, Any]) -> Application:
    """Build the Serve application.

    API keys are read from ``FATHOM_API_KEY``, operators' from ``FATHOM_OPERATOR_KEY``, in the
    process that calls this.

    Args:
        config: settings, or the ``args`` mapping of a Serve config file, in ``ServeConfig``'s
            form.

    Raises:
        ConfigError: for settings or operating points that cannot be used, or a public address
            without a key.
    """
    config = _settings(config)
    check_operators()
    digests, operators = digests_from_env(), operator_digests_from_env()
    check_bind(config.host, digests)
    # Read here, once, and sent along: the file need not be on every node.
    points, point = _points_of(config)
    config = _with_default(config, points, point)
    # The environment of this process, as for the keys: that of a worker is its node's.
    endpoint = endpoint_of(config.otlp_traces_endpoint)
    config = dataclasses.replace(config, otlp_traces_endpoint=endpoint)
    if config.topology is Topology.FUSED:
        engines = _serving(FusedReplica, FUSED, config).bind(config, points)
    elif config.topology is Topology.VLLM:
        engines = _serving(VllmReplica, VLLM, config, actor=_vllm_actor(config)).bind(config)
    elif config.placement is Placement.BESIDE:
        cores = (config.shallow.cpus, config.deep.cpus)
        engines = _serving(
            ShallowReplica,
            SHALLOW,
            config,
            placement_group_bundles=[{"CPU": cpus} for cpus in cores],
            placement_group_strategy="STRICT_PACK",
        ).bind(config, None, points)
    else:
        deep = _deployment(DeepReplica, DEEP, config, config.deep, ByQueue)
        engines = _serving(ShallowReplica, SHALLOW, config).bind(config, deep.bind(config), points)
    ingress = serve.deployment(
        name=INGRESS,
        num_replicas=config.num_ingress_replicas,
        ray_actor_options={"num_cpus": INGRESS_CPUS},
        max_ongoing_requests=UNLIMITED,
        max_surge_percent=config.surge_percent,
        graceful_shutdown_wait_loop_s=0.25,
        graceful_shutdown_timeout_s=config.drain_s + 2,
        max_constructor_retry_count=1,
        user_config=AS_STARTED,
    )(serve.ingress()(Ingress))
    if not config.classifier:
        return ingress.bind(engines, config, digests, None, points, operators)
    pool = PoolConfig(cpus=CLASSIFIER_CPUS)
    classifier = _deployment(ClassifierReplica, CLASSIFIER, config, pool, ByRequests)
    classifying = classifier.bind(config.classifier, CLASSIFIER_CPUS)
    return ingress.bind(engines, config, digests, classifying, points, operators)


def run(config: ServeConfig, *, blocking: bool = True) -> Server:
    """Serve on ``config.host`` and ``config.port``, on a Ray started here if there is none.

    Args:
        blocking: serve until Ctrl-C or SIGTERM, then drain and stop. Otherwise return as soon as
            requests are answered; the caller stops the server.

    Raises:
        ConfigError: for settings that cannot be used, a public address without a key, or a port
            that is taken.
        ModelError: if the model is not to be had.
        ServerError: if the application does not come up, with the reason.
    """
    config = _settings(config)
    server = start(build(config), config)
    if blocking:
        server.wait()
    return server


def _settings(config: ServeConfig | Mapping[str, Any]) -> ServeConfig:
    if not isinstance(config, ServeConfig):
        config = from_mapping(ServeConfig, config)
    config.validate()
    return config


def _points_of(config: ServeConfig) -> tuple[OperatingPoints | None, str]:
    """The operating points to serve, and the one of them that was promoted, if one was.

    Raises:
        ConfigError: for a file that cannot be used, or a version without a registry.
        RegistryError: if there is no such version, or the registry does not answer.
    """
    where = config.operating_points
    if not where:
        return None, ""
    if not where.startswith(SCHEME):
        return load(Path(where)), ""
    if not config.mlflow:
        raise ConfigError(
            f"operating_points {where} is in a registry: say which by mlflow (--mlflow URI)."
        )
    from fathom.tuning.registry import Registry

    points, version = Registry(config.mlflow).load(where)
    return points, version.point


def _with_default(config: ServeConfig, points: OperatingPoints | None, point: str) -> ServeConfig:
    """The settings with the requests' default policy as an engine takes it.

    Args:
        point: what was promoted; taken where the settings say nothing themselves.
    """
    compute = config.engine.compute
    if config.topology is Topology.VLLM:  # which has no other, and has checked what was said
        compute = dataclasses.replace(compute, mode=AcceptMode.FULL)
    if point and compute == ComputePolicy():
        compute = ComputePolicy(operating_point=point)
    compute = resolve_default(compute, points)
    return dataclasses.replace(config, engine=dataclasses.replace(config.engine, compute=compute))


def _vllm_actor(config: ServeConfig) -> dict[str, Any]:
    """What a vLLM replica's process is, beyond its cores."""
    found: dict[str, Any] = {}
    if config.vllm.gpus:
        found["num_gpus"] = config.vllm.gpus
    if config.vllm.python:
        found["runtime_env"] = {"py_executable": config.vllm.python}
    return found


def _deployment(
    kind: type,
    name: str,
    config: ServeConfig,
    pool: PoolConfig,
    policy: type,
    actor: Mapping[str, Any] = MappingProxyType({}),
    **more: Any,
) -> serve.Deployment:
    """A pool of replicas as a deployment.

    Args:
        policy: class of the policy by which the pool follows its load, where it does.
        actor: options of its actors, beside their cores. more: options of Serve.
    """
    size: dict[str, Any] = {"num_replicas": pool.num_replicas}
    if pool.max_replicas:
        size = {"autoscaling_config": _autoscaling(pool, policy)}
    return serve.deployment(
        name=name,
        **size,
        ray_actor_options={"num_cpus": pool.cpus, **actor},
        max_ongoing_requests=UNLIMITED,
        max_surge_percent=config.surge_percent,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.25,
        graceful_shutdown_timeout_s=config.drain_s,
        # A model that cannot be loaded will not load the next time either.
        max_constructor_retry_count=1,
        **more,
    )(kind)


def _serving(kind: type, name: str, config: ServeConfig, **more: Any) -> serve.Deployment:
    """The replicas behind the ingress, with the way in which requests get to them."""
    if config.router is Router.PREFIX:
        more["request_router_config"] = RequestRouterConfig(
            request_router_class=ROUTER,  # type: ignore[arg-type]
            request_router_kwargs=dataclasses.asdict(config.routing),
        )
    more["user_config"] = AS_STARTED
    return _deployment(kind, name, config, config.serving, ByRequests, **more)


def _autoscaling(pool: PoolConfig, policy: type) -> AutoscalingConfig:
    # How often a replica says how it does. Serve will take this from the environment one day.
    interval = min(10.0, pool.look_back_s / 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=pool.min_replicas,
            initial_replicas=pool.num_replicas,
            max_replicas=pool.max_replicas,
            upscale_delay_s=pool.upscale_delay_s,
            downscale_delay_s=pool.downscale_delay_s,
            look_back_period_s=pool.look_back_s,
            metrics_interval_s=interval,
            policy=AutoscalingPolicy(  # type: ignore[no-untyped-call]
                policy_function=f"deployments.autoscaling:{policy.__name__}",
                policy_kwargs={"target": pool.target},
            ),
        )
