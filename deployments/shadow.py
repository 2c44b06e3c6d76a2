"""The shadow of an application: what its replicas tell of completions, watched in one Ray actor.

Each replica hands over its completions every two seconds, from a thread of its own; so does each
ingress what the operating points promise. The actor tests for drift (``fathom.exits.drift``), for
evidence from one stream is stronger than that from several put together, and logs to MLflow from a
thread: nothing there keeps a request, an engine's step or a scrape waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
import time
import uuid
import zlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Protocol

import ray
from ray.exceptions import GetTimeoutError, RayError

from fathom.config import ServeConfig
from fathom.exits.drift import Expected
from fathom.exits.shadow import Shadowed, ShadowLog
from fathom.exits.shadow_watch import ShadowWatch
from fathom.kvstore.ray_store import NAMESPACE
from fathom.tuning.serve_run import ServeRun
from fathom.types import AcceptMode, ComputePolicy, Request, RequestOutput, SamplingParams

logger = logging.getLogger("ray.serve")

PERIOD_S = 2.0
_ANSWER_S = 5.0
_END_S = 15.0
_ALONE_S = 600.0
_MOST_KEPT = 4096
"""Completions that a replica keeps while the actor is away."""


class ShadowActor:
    """A ``ShadowWatch`` in a process of its own; it outlives who started it (``PolicyActor``).

    Args:
        server: see ``ServeRun``; the same when Ray starts it anew. tags: of the run.
        alone_s: seconds without a word of anybody after which it ends itself.
    """

    def __init__(
        self, config: ServeConfig, server: str, tags: Mapping[str, str], alone_s: float = _ALONE_S
    ) -> None:
        self._config = config
        self._watch = ShadowWatch(config.shadow.false_alarms)
        self._lock = threading.Lock()
        self._called = time.monotonic()
        self._self = ray.get_runtime_context().current_actor
        self._run = None
        self._ended = threading.Event()
        if config.mlflow:
            every_s = config.shadow.every_s
            self._run = ServeRun(config.mlflow, server=server, tags=tags, every_s=every_s)
            self._logging = threading.Thread(target=self._log, name="fathom-mlflow", daemon=True)
            self._logging.start()
        threading.Thread(
            target=self._attend, args=(alone_s,), name="fathom-shadow", daemon=True
        ).start()

    def take(self, completions: Sequence[Shadowed]) -> None:
        """See ``ShadowWatch.take``."""
        with self._lock:
            self._called = time.monotonic()
            self._watch.take(completions)

    def expect(self, expected: Mapping[str, Expected]) -> None:
        """See ``ShadowWatch.expect``."""
        with self._lock:
            self._called = time.monotonic()
            self._watch.expect(expected)

    def state(self) -> dict[str, Any]:
        """What was found, as JSON can hold it; see ``Service.shadow``."""
        with self._lock:
            found: dict[str, Any] = {
                "rate": self._config.shadow.rate,
                "false_alarms": self._config.shadow.false_alarms,
                "alert": self._watch.alert,
                "points": self._watch.points(),
            }
        run = self._run
        if run is not None:
            found["mlflow"] = {"uri": run.uri, "run_id": run.run_id, "error": run.error}
        return found

    def end(self) -> None:
        """Log what there is, and end the run in MLflow."""
        self._ended.set()
        if self._run is not None:
            self._logging.join()

    def _log(self) -> None:
        assert self._run is not None
        ended = False
        while not ended:
            ended = self._ended.wait(self._config.shadow.every_s)
            with self._lock:
                points = self._watch.points()
            self._run.log(points)
        self._run.end()

    def _attend(self, alone_s: float) -> None:
        while time.monotonic() - self._called <= alone_s:
            time.sleep(alone_s / 8)
        self.end()
        ray.kill(self._self)


class ShadowedEngine(Protocol):
    """What is used of ``fathom.engine.async_engine.AsyncEngine``."""

    info: Any

    def generate(self, request: Request) -> AsyncIterator[RequestOutput]: ...

    def stats(self) -> dict[str, float]: ...


class ShadowReporter:
    """One replica's part: a thread that hands its completions over until ``close``.

    Args:
        application: whose actor it is; started if there is none.
        log: of the engine.
    """

    def __init__(
        self,
        application: str,
        config: ServeConfig,
        log: ShadowLog,
        engine: ShadowedEngine,
        *,
        period_s: float = PERIOD_S,
    ) -> None:
        self._application = application
        self._config = config
        self._log = log
        self._engine = engine
        self._period_s = period_s
        self._ended = threading.Event()
        threading.Thread(target=self._loop, name="fathom-shadow", daemon=True).start()

    def close(self) -> None:
        """End the thread; returns at once."""
        self._ended.set()

    def _loop(self) -> None:
        actor: Any = None
        unread: deque[Shadowed] = deque(maxlen=_MOST_KEPT)
        ready: deque[Shadowed] = deque(maxlen=_MOST_KEPT)
        while not self._ended.wait(self._period_s):
            for each in self._log.drain():
                (ready if each.unread is None else unread).append(each)
            try:
                # Live requests go first; what is unread can wait.
                while unread and not self._engine.stats()["num_requests_waiting"]:
                    each = unread.popleft()
                    asyncio.run(score(self._engine, each))
                    ready.append(each)
                if not ready:
                    continue
                actor = actor or find_shadow(self._application, self._config)
                answer = actor.take.remote(list(ready))
                # After a time-out it may have come or not; evidence must not count twice.
                with contextlib.suppress(GetTimeoutError):
                    ray.get(answer, timeout=_ANSWER_S)
                ready.clear()
            except (RayError, ValueError) as error:  # ValueError: nobody of that name
                logger.debug("the shadow's actor is away: %s", error)
                actor = None
            except Exception as error:
                if self._ended.is_set() or not ray.is_initialized():
                    return
                logger.warning("The shadow could not be told of completions: %s", error)


async def score(engine: ShadowedEngine, completion: Shadowed) -> None:
    """Ask the full model about every token of an unread text, in one pass over it.

    The last token of a text that fills the model's context is not asked about.

    Raises:
        RuntimeError: if the engine ends the request without an answer.
    """
    assert completion.unread is not None
    tokens = completion.unread.tokens[: engine.info.max_model_len - 1]
    best: list[int | None] = [None] * len(completion.unread.tokens)
    request = Request(
        request_id=f"shadow-{uuid.uuid4().hex}",
        prompt_token_ids=tokens,
        sampling=SamplingParams(max_tokens=0, prompt_logprobs=1),
        compute=ComputePolicy(mode=AcceptMode.FULL),
    )
    layer_tokens, answered = 0, False
    async for output in engine.generate(request):
        answered = answered or output.prompt_tokens is not None
        for place, token in enumerate(output.prompt_tokens or ()):
            best[place] = next(iter(token.top_logprobs), None) if token.top_logprobs else None
        if output.usage is not None:
            page = output.usage.compute
            layer_tokens = (
                page.prefill_layer_tokens + page.shallow_layer_tokens + page.deep_layer_tokens
            )
    if not answered:
        raise RuntimeError("the text of a completion could not be scored.")
    completion.settle(best, layer_tokens)


class ShadowDesk:
    """An ingress's part: says what operating points promise, and asks what was found.

    Args:
        expected: what is promised now; called every few seconds.
    """

    def __init__(
        self,
        application: str,
        config: ServeConfig,
        expected: Callable[[], Mapping[str, Expected]],
        *,
        period_s: float = PERIOD_S,
    ) -> None:
        self._application = application
        self._config = config
        self._expected = expected
        self._period_s = period_s
        self._actor: Any = None
        self._ended = threading.Event()
        threading.Thread(target=self._loop, name="fathom-shadow", daemon=True).start()

    async def state(self) -> Mapping[str, Any] | None:
        """``ShadowActor.state``; None while the actor is away."""
        actor = self._actor
        if actor is None:
            return None
        try:
            async with asyncio.timeout(_ANSWER_S):
                found: dict[str, Any] = await actor.state.remote()
                return found
        except (RayError, TimeoutError):
            return None

    def close(self) -> None:
        """End the thread; returns at once."""
        self._ended.set()

    def _loop(self) -> None:
        while True:
            try:
                self._actor = self._actor or find_shadow(self._application, self._config)
                ray.get(self._actor.expect.remote(self._expected()), timeout=_ANSWER_S)
            except (RayError, ValueError) as error:
                logger.debug("the shadow's actor is away: %s", error)
                if not isinstance(error, GetTimeoutError):
                    self._actor = None
            except Exception as error:
                if self._ended.is_set() or not ray.is_initialized():
                    return
                logger.warning("The shadow could not be told of operating points: %s", error)
            if self._ended.wait(self._period_s):
                return


def find_shadow(application: str, config: ServeConfig) -> Any:
    """The application's actor, started if there is none."""
    actor: Any = ray.remote(ShadowActor)
    tags = {
        "fathom.application": application,
        "fathom.model": config.model_name or config.engine.model,
        "fathom.shadow_rate": str(config.shadow.rate),
    }
    return actor.options(
        name=_name(application, config),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=0,
        max_concurrency=4,  # it answers while it ends
    ).remote(config, secrets.token_hex(4), tags)


def stop_shadow(application: str) -> None:
    """End an application's actor, and its run in MLflow; those of earlier settings too."""
    named = ray.util.list_named_actors(all_namespaces=True)
    ours = [each["name"] for each in named if each["namespace"] == NAMESPACE]
    for name in ours:
        if name.rpartition("/")[0] != f"shadow-of-{application}":
            continue
        with contextlib.suppress(ValueError):  # it has just ended
            actor = ray.get_actor(name, namespace=NAMESPACE)
            with contextlib.suppress(RayError):
                ray.get(actor.end.remote(), timeout=_END_S)
            ray.kill(actor)


def _name(application: str, config: ServeConfig) -> str:
    """By the settings too: an update that changes them has an actor of its own."""
    settings = repr((config.shadow, config.mlflow))
    return f"shadow-of-{application}/{zlib.crc32(settings.encode()):08x}"
