"""vLLM behind the interface of ``engine.async_engine.AsyncEngine``: all layers at every token."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any

from fathom.engine.async_engine import EngineDead
from fathom.engine.info import EngineInfo
from fathom.engine.requests import check_request
from fathom.engine.text import DetokenizerFactory
from fathom.exits.live import LivePolicies
from fathom.ledger import Ledger
from fathom.types import ComputePolicy, FinishReason, InvalidRequest, Request, RequestOutput
from fathom.vllm.completion import Completion
from fathom.vllm.convert import check_compute, check_resumption, sampling_arguments
from fathom.vllm.figures import Figures

_News = asyncio.Queue[RequestOutput | Exception]

_NO_STACK = 1 << 30
"""Rows of a pass, for checks: nothing is drafted, so no stack has to fit into one."""


class VllmEngine:
    """Runs requests at vLLM's ``AsyncLLM``. One event loop owns it.

    Args:
        llm: the ``AsyncLLM``, started. new_params: its ``SamplingParams``, by keywords, to give
            news alone (``RequestOutputKind.DELTA``). client_error: what it raises for a request
            that it refuses.
        lifeline: what ends vLLM's processes with this one (``vllm.lifeline``).
        new_detokenizer: None where only token ids matter.

    Attributes:
        info: what it runs. ledger: the account of compute since it started.
    """

    def __init__(
        self,
        *,
        llm: Any,
        new_params: Callable[..., Any],
        client_error: type[Exception],
        info: EngineInfo,
        ledger: Ledger,
        lifeline: subprocess.Popen[bytes],
        figures: Figures,
        new_detokenizer: DetokenizerFactory | None = None,
    ) -> None:
        self.info = info
        self.ledger = ledger
        self._llm = llm
        self._new_params = new_params
        self._client_error = client_error
        self._figures = figures
        self._lifeline = lifeline
        self._new_detokenizer = new_detokenizer
        self._tasks: dict[str, set[asyncio.Task[None]]] = {}
        self._closed = False

    async def warm_up(self) -> None:
        """Make two tokens, which compiles what vLLM compiles at its first step.

        Raises:
            RuntimeError: if it cannot make them.
        """
        params = self._new_params(temperature=0.0, max_tokens=2, ignore_eos=True, detokenize=False)
        async for _ in self._llm.generate({"prompt_token_ids": [0]}, params, "warm-up"):
            pass

    async def generate(self, request: Request) -> AsyncIterator[RequestOutput]:
        """Run a request; yields its news until each of its open completions has ended.

        Closing the iterator, or cancelling the task that waits on it, cancels the request.

        Raises:
            InvalidRequest: naming the field, its value and the remedy.
            EngineDead: if vLLM's engine has died.
        """
        self.check_health()
        self._check(request)
        name, news = request.request_id, _News()
        open_indices = [
            index
            for index in range(request.n)
            if not (request.resumed and request.resumed[index].finished)
        ]
        tasks = self._tasks[name] = set()
        for index in open_indices:
            done = Completion(request, index, self.info, self.ledger, self._new_detokenizer)
            task = asyncio.create_task(self._complete(request, done, news))
            # Also of one that is cancelled before it has begun.
            task.add_done_callback(partial(_tell_cancelled, done, news))
            tasks.add(task)
        left = len(open_indices)
        try:
            while left:
                output = await news.get()
                if isinstance(output, Exception):
                    raise self._explained(output) from output
                left -= output.finish_reason is not None
                yield output
        finally:
            del self._tasks[name]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def cancel(self, request_id: str) -> bool:
        """End a request; its stream ends with ``finish_reason`` cancelled.

        Returns:
            whether there was such a request.
        """
        tasks = self._tasks.get(request_id)
        for task in tasks or ():
            task.cancel()
        return tasks is not None

    def stats(self) -> dict[str, float]:
        """Figures of this moment and totals since the start; names as in the metrics."""
        live = sum(not task.done() for tasks in self._tasks.values() for task in tasks)
        return self._figures.stats(self.ledger, live)

    def check_health(self) -> None:
        """Check that vLLM's engine lives.

        Raises:
            EngineDead: if it does not.
        """
        if self._closed:
            raise EngineDead("the engine was shut down")
        if self._llm.errored:
            raise EngineDead("vLLM's engine process has died; its log says why")

    async def check_compute(self, compute: ComputePolicy) -> None:
        """Check that a policy can run here.

        Raises:
            InvalidRequest: unless it runs all layers at every token.
        """
        check_compute(compute)

    async def policies(self) -> Mapping[str, Any]:
        """What the exit policies have seen: nothing, as no token can exit."""
        return LivePolicies(1.0).snapshot()

    async def shutdown(self, drain_s: float = 0.0) -> None:
        """Let live requests finish for up to ``drain_s`` seconds, then stop vLLM's processes."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + drain_s
        while self._tasks and loop.time() < deadline and not self._llm.errored:
            await asyncio.sleep(0.05)
        self._closed = True
        for tasks in list(self._tasks.values()):
            for task in tasks:
                task.cancel()
        await asyncio.to_thread(partial(self._llm.shutdown, timeout=5))
        await asyncio.to_thread(self._lifeline.communicate)

    def _check(self, request: Request) -> None:
        if request.request_id in self._tasks:
            raise InvalidRequest(
                f"request_id {request.request_id!r} is in use by a live request.",
                param="request_id",
            )
        check_compute(request.compute)
        check_request(
            request,
            self.info,
            max_rows=_NO_STACK,
            has_tokenizer=self._new_detokenizer is not None,
        )
        check_resumption(request)

    async def _complete(self, request: Request, done: Completion, news: _News) -> None:
        """Run one completion, and put what is new of it into ``news``."""
        if done.finish_reason is not None:  # the loss came before the news of its end
            news.put_nowait(done.end(done.finish_reason))
            return
        try:
            async with (
                asyncio.timeout(request.timeout_s),
                aclosing(self._stream(request, done)) as outputs,
            ):
                async for output in outputs:
                    found = done.take(output)
                    if found is not None:
                        news.put_nowait(found)
                    if done.over:
                        return
            news.put_nowait(done.end(FinishReason.ERROR, "vLLM ended it without a reason"))
        except TimeoutError:
            reason = f"not done within {request.timeout_s} s"
            news.put_nowait(done.end(FinishReason.DEADLINE, reason))
        except Exception as error:
            news.put_nowait(error)

    def _stream(self, request: Request, done: Completion) -> Any:
        """The completion at vLLM: an async generator of its ``RequestOutput``."""
        arguments = sampling_arguments(request, done.index, self.info, done.given)
        prompt: dict[str, Any] = {"prompt_token_ids": list(done.prompt)}
        if request.cache_salt:
            prompt["cache_salt"] = request.cache_salt
        name = f"{request.request_id}-{done.index}"
        return self._llm.generate(prompt, self._new_params(**arguments), name)

    def _explained(self, error: Exception) -> Exception:
        """An error of vLLM's as one of ours."""
        if isinstance(error, self._client_error):
            return InvalidRequest(str(error), param=getattr(error, "parameter", None))
        if self._llm.errored:
            return EngineDead(f"vLLM's engine has died: {error!r}")
        return error


def _tell_cancelled(done: Completion, news: _News, task: asyncio.Task[None]) -> None:
    if task.cancelled():  # whoever has gone away does not read it
        news.put_nowait(done.end(FinishReason.CANCELLED))
