"""The engine behind an asyncio interface: one thread steps it, coroutines wait for outputs."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from fathom.config import EngineConfig
from fathom.engine.engine import Engine
from fathom.engine.info import EngineInfo
from fathom.exits.load import LadderPoints
from fathom.types import ComputePolicy, Request, RequestOutput

_News = list[tuple[asyncio.Queue[Any], Any]]
"""Items, each with the queue that it is for."""


class EngineDead(RuntimeError):
    """The engine's thread ended by an error; the process should be replaced."""


class AsyncEngine:
    """Owns an engine on a thread of its own.

    Attributes:
        info, tokenizer: the engine's.
    """

    def __init__(self, engine: Engine) -> None:
        self.info: EngineInfo = engine.info
        self.tokenizer: Any = engine.tokenizer
        self._engine = engine
        self._wake = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._streams: dict[str, tuple[asyncio.AbstractEventLoop, asyncio.Queue[Any], int]] = {}
        self._stopping = False
        self._death: BaseException | None = None
        self._stats: dict[str, float] = engine.stats()
        self._thread = threading.Thread(target=self._loop, name="fathom-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_config(cls, config: EngineConfig) -> AsyncEngine:
        """Load a model and start its engine; blocks until it can serve.

        Raises:
            ConfigError, ModelError: see ``Engine.from_config``.
        """
        return cls(Engine.from_config(config))

    async def generate(self, request: Request) -> AsyncIterator[RequestOutput]:
        """Run a request; yields its news until each of its open completions has ended.

        Closing the iterator, or cancelling the task that waits on it, cancels the request.

        Raises:
            InvalidRequest: naming the field, its value and the remedy.
            EngineDead: if the engine's thread ends.
        """
        queue: asyncio.Queue[Any] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        name = request.request_id
        done = False

        def add() -> None:
            self._engine.add_request(request)
            self._streams[name] = (loop, queue, request.num_open)

        try:
            await self._run_on_thread(add)
        except asyncio.CancelledError:
            self._post(lambda: self._cancel(name))
            raise
        try:
            open_completions = request.num_open
            while open_completions:
                output = await queue.get()
                if isinstance(output, BaseException):
                    done = True
                    raise EngineDead(f"the engine stopped: {output!r}") from output
                open_completions -= output.finish_reason is not None
                done = open_completions == 0
                yield output
        finally:
            if not done:
                self._post(lambda: self._cancel(name))

    async def cancel(self, request_id: str) -> bool:
        """End a request; its stream ends with ``finish_reason`` cancelled.

        Returns:
            whether there was such a request.
        """
        return bool(await self._run_on_thread(lambda: self._engine.cancel(request_id)))

    async def policies(self) -> dict[str, Any]:
        """What the exit policies have seen; see ``LivePolicies.snapshot``."""
        found: dict[str, Any] = await self._run_on_thread(self._engine.policies.snapshot)
        return found

    async def merge_policies(self, others: Sequence[Mapping[str, Any]]) -> None:
        """Take what other replicas have seen; see ``LivePolicies.merge``.

        Raises:
            ValueError: for what is no snapshot.
        """
        await self._run_on_thread(lambda: self._engine.policies.merge(others))

    async def check_compute(self, compute: ComputePolicy) -> None:
        """See ``Engine.check_compute``.

        Raises:
            InvalidRequest: for a policy that cannot run here.
        """
        await self._run_on_thread(lambda: self._engine.check_compute(compute))

    async def take_points(self, points: LadderPoints) -> None:
        """See ``Engine.take_points``."""
        await self._run_on_thread(lambda: self._engine.take_points(points))

    def stats(self) -> dict[str, float]:
        """The engine's figures after its last step."""
        return dict(self._stats)

    def move_deep(self) -> None:
        """See ``Engine.move_deep``; returns at once."""
        self._post(self._engine.move_deep)

    def check_health(self) -> None:
        """Check that the engine's thread lives.

        Raises:
            EngineDead: naming what ended it.
        """
        if self._death is not None:
            raise EngineDead(f"the engine stopped: {self._death!r}") from self._death
        if not self._thread.is_alive():
            raise EngineDead("the engine was shut down")

    async def shutdown(self, drain_s: float = 0.0) -> None:
        """Let live requests finish for up to ``drain_s`` seconds, then stop."""
        deadline = time.monotonic() + drain_s
        while self._streams and time.monotonic() < deadline and self._death is None:
            await asyncio.sleep(0.05)
        with self._wake:
            self._stopping = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    def _post(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    async def _run_on_thread(self, function: Callable[[], Any]) -> Any:
        self.check_health()
        answer: Future[Any] = Future()

        def command() -> None:
            try:
                answer.set_result(function())
            except Exception as error:
                answer.set_exception(error)

        self._post(command)
        # Shielded: a caller that goes away must not leave the future cancelled under the thread.
        return await asyncio.shield(asyncio.wrap_future(answer))

    def _cancel(self, request_id: str) -> None:
        self._streams.pop(request_id, None)
        self._engine.cancel(request_id)

    # The thread

    def _loop(self) -> None:
        try:
            while True:
                with self._wake:
                    while not (self._commands or self._stopping or self._engine.has_work()):
                        self._wake.wait()
                    commands, self._commands = self._commands, deque()
                if self._stopping:
                    break
                for command in commands:
                    command()
                outputs = self._engine.step() if self._engine.has_work() else []
                self._stats = self._engine.stats()
                self._deliver(outputs)
            self._fail_all(RuntimeError("shut down"), commands)
        except BaseException as error:
            self._death = error
            self._fail_all(error, self._commands)
            if not isinstance(error, Exception):
                raise
        finally:
            self._engine.close()

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        """Hand a step's news over: loops are woken once a step, not once a token."""
        news: dict[asyncio.AbstractEventLoop, _News] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            loop, queue, left = stream
            if output.finish_reason is not None:
                left -= 1
                if left:
                    self._streams[output.request_id] = (loop, queue, left)
                else:
                    del self._streams[output.request_id]
            news.setdefault(loop, []).append((queue, output))
        for loop, items in news.items():
            _send(loop, items)

    def _fail_all(self, error: BaseException, commands: deque[Callable[[], None]]) -> None:
        """Nobody may wait for an engine that is gone."""
        for command in commands:
            command()  # answers their callers; additions get a stream and end below
        for loop, queue, _ in self._streams.values():
            _send(loop, [(queue, error)])
        self._streams.clear()


def _send(loop: asyncio.AbstractEventLoop, news: _News) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
        loop.call_soon_threadsafe(_put, news)


def _put(news: _News) -> None:
    for queue, item in news:
        queue.put_nowait(item)
