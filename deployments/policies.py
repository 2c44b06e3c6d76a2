"""What exit policies have seen, shared by all replicas of an application through a Ray actor.

Each replica tells the actor about once a second, from a thread of its own, what its engine has
seen, and is told what all the others have (``fathom.exits.cluster``). No step of an engine waits
for any of it. While the actor does not answer, a replica goes on with what it knows; what the
others had told is dropped when it is old, and taken again when the actor is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from fathom.exits.cluster import SILENT_S, Board
from fathom.kvstore.ray_store import NAMESPACE

logger = logging.getLogger("ray.serve")

PERIOD_S = 1.0
_ANSWER_S = 5.0
"""Seconds after which an actor that does not answer counts as away."""
_ALONE_S = 600.0


class PolicyActor:
    """A ``Board`` in a process of its own.

    It outlives who started it. When the whole application has gone without ending it, it ends
    itself.

    Args:
        alone_s: seconds without a word of any replica after which it does.
    """

    def __init__(self, alone_s: float = _ALONE_S) -> None:
        self._board = Board()
        self._alone_s = alone_s
        self._called = time.monotonic()
        self._self = ray.get_runtime_context().current_actor
        threading.Thread(target=self._watch, name="fathom-policies", daemon=True).start()

    def exchange(
        self, replica: str, group: str, snapshot: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """See ``Board.exchange``."""
        self._called = time.monotonic()
        return self._board.exchange(replica, group, snapshot, self._called)

    def replicas(self) -> int:
        """Replicas whose latest word is here."""
        return len(self._board)

    def _watch(self) -> None:
        while time.monotonic() - self._called <= self._alone_s:
            time.sleep(self._alone_s / 8)
        ray.kill(self._self)


class SharedEngine(Protocol):
    """What is used of ``fathom.engine.async_engine.AsyncEngine``."""

    async def policies(self) -> dict[str, Any]: ...

    async def merge_policies(self, others: Sequence[Mapping[str, Any]]) -> None: ...


class PolicyExchange:
    """One replica's part in it: a thread that goes on until ``close``, or its engine's end.

    Args:
        application: whose actor it is; started if there is none.
        replica: its name there, unique within the application.
        group: ``EngineInfo.exit_identity``: an update may change it while old replicas still work.
        period_s: seconds between two exchanges.
        silent_s: seconds without the actor after which what others had told is dropped.
    """

    def __init__(
        self,
        application: str,
        replica: str,
        group: str,
        engine: SharedEngine,
        *,
        period_s: float = PERIOD_S,
        silent_s: float = SILENT_S,
    ) -> None:
        self._application = application
        self._replica = replica
        self._group = group
        self._engine = engine
        self._period_s = period_s
        self._silent_s = silent_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="fathom-policies", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; returns at once."""
        self._ended.set()

    def _loop(self) -> None:
        # Not at the top: it loads torch, which the actor's process has no use for.
        from fathom.engine.async_engine import EngineDead

        actor: Any = None
        heard: float | None = None  # when others last told anything that holds still
        while not self._ended.wait(self._period_s):
            try:
                # Their loops live as long as one question: both are answered between two steps.
                snapshot = asyncio.run(self._engine.policies())
                try:
                    actor = actor or _find(self._application)
                    others = ray.get(
                        actor.exchange.remote(self._replica, self._group, snapshot),
                        timeout=_ANSWER_S,
                    )
                    heard = time.monotonic()
                except (RayError, ValueError) as error:  # ValueError: nobody of that name
                    logger.debug("exit policies are not shared now: %s", error)
                    actor = None  # one that was killed never comes back
                    if heard is None or time.monotonic() - heard < self._silent_s:
                        continue
                    others, heard = [], None
                asyncio.run(self._engine.merge_policies(others))
            except EngineDead:
                return
            except Exception as error:
                if self._ended.is_set() or not ray.is_initialized():
                    return
                logger.warning("Exit policies could not be shared: %s", error)


def stop_policies(application: str) -> None:
    """End an application's actor, and with it what it knew."""
    with contextlib.suppress(ValueError):  # there is none
        ray.kill(ray.get_actor(_name(application), namespace=NAMESPACE))


def _find(application: str) -> Any:
    actor: Any = ray.remote(PolicyActor)
    return actor.options(
        name=_name(application),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=0,
    ).remote()


def _name(application: str) -> str:
    return f"policies-of-{application}"
