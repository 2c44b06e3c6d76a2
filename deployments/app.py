"""The application: ``build`` for ``serve deploy`` and ``serve run``, ``run`` for one machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application

from deployments.cluster import Server, start
from deployments.ingress import Ingress
from deployments.replica import FusedReplica
from fathom.api.auth import check_bind, digests_from_env
from fathom.config import ServeConfig, from_mapping

# The ingress counts requests (see HandleBackend); Serve's own limits, of 5 by default, must never
# be what a request meets.
UNLIMITED = 1_000_000
INGRESS_CPUS = 0.1


def build(config: ServeConfig | Mapping[str, Any]) -> Application:
    """Build the Serve application.

    API keys are read from ``FATHOM_API_KEY`` in the process that calls this.

    Args:
        config: settings, or the ``args`` mapping of a Serve config file, in ``ServeConfig``'s
            form.

    Raises:
        ConfigError: for settings that cannot be used, or a public address without a key.
    """
    config = _settings(config)
    digests = digests_from_env()
    check_bind(config.host, digests)
    replica = serve.deployment(
        name="Engine",
        num_replicas=config.num_replicas,
        ray_actor_options={"num_cpus": config.cpus_per_replica},
        max_ongoing_requests=UNLIMITED,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.25,
        graceful_shutdown_timeout_s=config.drain_s,
        # A model that cannot be loaded will not load the next time either.
        max_constructor_retry_count=1,
    )(FusedReplica)
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=1,  # metrics of requests live in it
        ray_actor_options={"num_cpus": INGRESS_CPUS},
        max_ongoing_requests=UNLIMITED,
        graceful_shutdown_wait_loop_s=0.25,
        graceful_shutdown_timeout_s=config.drain_s + 2,
        max_constructor_retry_count=1,
    )(serve.ingress()(Ingress))
    return ingress.bind(replica.bind(config), config, digests)


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
