"""Operating points taken over by a running server, through the ``user_config`` of its deployments.

Serve keeps a deployment's ``user_config``, gives it to its replicas by their ``reconfigure`` and to
every replica that starts later, after its constructor and before its first request. So what was
promoted outlives any process, Serve's controller included. The ingress resolves what requests ask
for, the replicas shift under load: both kinds get the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from deployments.handle_backend import REPORT_TIMEOUT_S
from deployments.user_config import set_user_config, user_config_of
from fathom.api.backend import BackendUnavailable
from fathom.api.errors import not_all_yet, other_model, promoted_meanwhile
from fathom.api.promotion import Promoted, Promotion, promoted_of
from fathom.config import ConfigError
from fathom.types import ComputePolicy, InvalidRequest

TAKEN_S = 60.0
"""Seconds in which every process should have heard; one that is starting may take longer."""
_PERIOD_S = 0.1


class ServeTakeover:
    """See ``fathom.api.promotion.Takeover``. For an ingress: it must be made in its constructor.

    Args:
        engine: handle of the replicas.
        started: the policy of requests that name none, as the server was started.
    """

    def __init__(self, engine: DeploymentHandle, started: ComputePolicy) -> None:
        context = serve.get_replica_context()
        self._application = context.app_name
        self._ingress = context.deployment
        self._handles = (
            serve.get_deployment_handle(context.deployment, context.app_name),
            engine,
        )
        self._engine = engine
        self._started = started
        self._one_at_a_time = asyncio.Lock()

    async def promote(self, promotion: Promotion) -> None:
        """See ``Takeover``."""
        await self._check(promotion)
        await self._change(lambda promoted: promoted.promote(promotion))

    async def rollback(self) -> None:
        """See ``Takeover``."""
        await self._change(Promoted.rolled_back)

    async def _check(self, promotion: Promotion) -> None:
        """Ask every replica first: one that cannot reconfigure itself would be replaced."""
        try:
            compute = promotion.default_compute(self._started)
        except ConfigError as error:
            raise InvalidRequest(str(error), param="default") from error
        answers = await self._ask(self._engine, "check_points", promotion.points, compute)
        for answer in answers:
            if isinstance(answer, ConfigError):
                raise other_model(str(answer)) from answer
            if isinstance(answer, InvalidRequest):
                raise InvalidRequest(
                    f"the points cannot be run here: compute.{answer}", param="points"
                ) from answer
        if not any(answer is None for answer in answers):
            raise BackendUnavailable("No engine is up to check the points; try again soon.")

    async def _change(self, change: Callable[[Promoted], Promoted]) -> None:
        async with self._one_at_a_time:
            body = await asyncio.to_thread(user_config_of, self._application, self._ingress)
            before = promoted_of(body)
            after = change(before)
            if after is not before:
                names = (self._ingress, self._engine.deployment_name)
                await asyncio.to_thread(set_user_config, self._application, names, after.as_dict())
            await self._wait_for(after.revision, before.revision)

    async def _wait_for(self, revision: str, before: str) -> None:
        """Wait until every process has it.

        Raises:
            ApiError: if not all have it in time, or another change came.
        """
        deadline = time.monotonic() + TAKEN_S
        while time.monotonic() < deadline:
            there = [await self._ask(handle, "points_revision") for handle in self._handles]
            # While Serve is updating a deployment, some replicas may be left out of what it says.
            if all(there) and await asyncio.to_thread(self._settled):
                found = {each for answers in there for each in answers}
                if found == {revision}:
                    return
                if len(found) == 1 and not found & {before} and isinstance(found.pop(), str):
                    raise promoted_meanwhile()
            await asyncio.sleep(_PERIOD_S)
        raise not_all_yet(TAKEN_S)

    def _settled(self) -> bool:
        application = serve.status().applications.get(self._application)
        found = application.deployments if application else {}  # none while it is built anew
        names = (self._ingress, self._engine.deployment_name)
        return all(name in found and found[name].status != "UPDATING" for name in names)

    async def _ask(self, handle: DeploymentHandle, method: str, *args: object) -> list[object]:
        """The answers of all replicas, errors among them; none if there are no replicas."""
        try:
            answers = await handle.broadcast(method, *args).results_async(
                timeout_s=REPORT_TIMEOUT_S, return_exceptions=True
            )
        except (TimeoutError, RayActorError, DeploymentUnavailableError):
            return []
        return list(answers)
