"""Replicas of vLLM behind the same ingress: the full model, to compare with.

vLLM may be in an environment of its own (``vllm.python``): Serve starts the replica's process in
it, and no other process imports vLLM. That environment needs Fathom and the cluster's version of
Ray as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from deployments.replica import Replica
from fathom.api.promotion import promoted_of
from fathom.config import ConfigError, ServeConfig
from fathom.tuning.operating_points import OperatingPoints
from fathom.types import ComputePolicy, InvalidRequest


class VllmReplica(Replica):
    """Serves one engine of vLLM. Undecorated: ``app.build`` makes it a deployment.

    Raises:
        ConfigError: without vLLM, or for settings that cannot be used.
        ModelError: for a model that is not to be had.
        RuntimeError: if vLLM does not start.
    """

    # Serve awaits a constructor; vLLM's engine wants to be made where its requests will run.
    async def __init__(self, config: ServeConfig) -> None:  # type: ignore[misc]
        from fathom.vllm.start import start_vllm

        threads = max(1, int(config.serving.cpus))
        engine = start_vllm(dataclasses.replace(config.engine, threads=threads), config.vllm)
        await engine.warm_up()
        self._serve(config, engine)

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Called by Serve, at the start and after each promotion.

        Raises:
            ConfigError: for promoted points: no token can exit here.
        """
        if promoted_of(user_config).current is not None:
            raise _no_points()

    def points_revision(self) -> str:
        """Nothing can be promoted here."""
        return ""

    async def check_points(
        self, points: OperatingPoints, compute: ComputePolicy
    ) -> ConfigError | InvalidRequest | None:
        """What keeps this engine from points: see ``Replica.check_points``."""
        return _no_points()


def _no_points() -> ConfigError:
    return ConfigError(
        "operating points cannot be promoted with topology vllm, whose replicas run all layers at "
        "every token: promote them on a server of topology fused or disaggregated."
    )
