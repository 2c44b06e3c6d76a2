"""The service behind the routes: checks and tokenizes a request, runs it, shapes the answer."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, TypeVar

from fathom.api import convert
from fathom.api.backend import Backend, BackendUnavailable, ModelInfo, ReplicaReport
from fathom.api.errors import as_api_error, deadline_exceeded, model_not_found
from fathom.api.prompts import Tokenizer
from fathom.api.responses import ChatDialect, Choice, CompletionDialect, Dialect, Style
from fathom.api.run import Run
from fathom.api.schemas import ChatCompletionRequest, CompletionRequest, GenerationRequest
from fathom.api.sse import DONE, event
from fathom.api.usage import usage_body
from fathom.observability.metrics import RequestTimer, ServerMetrics
from fathom.types import Request

Answer = dict[str, Any] | AsyncGenerator[str, None]
Result = TypeVar("Result")


class Service:
    """Serves one model over a backend.

    Attributes:
        model_name: the name that clients ask for. metrics: what this service has measured.
    """

    def __init__(
        self,
        *,
        backend: Backend,
        tokenizer: Tokenizer,
        model_name: str,
        defaults: convert.Defaults,
    ) -> None:
        self.model_name = model_name
        self.metrics = ServerMetrics(model_name)
        self._backend = backend
        self._tokenizer = tokenizer
        self._defaults = defaults
        self._info: ModelInfo | None = None
        # One thread: long prompts do not stop the event loop, and the tokenizer is never shared.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="tokenize")

    async def reports(self) -> Sequence[ReplicaReport]:
        """The reports of all replicas that answer."""
        return await self._backend.reports()

    async def info(self) -> ModelInfo:
        """What is known of the model.

        Raises:
            BackendUnavailable: if no replica has answered yet.
        """
        if self._info is None:
            reports = await self._backend.reports()
            if not reports:
                raise BackendUnavailable("No engine is up yet; try again in a few seconds.")
            self._info = reports[0].info
        return self._info

    async def chat(self, body: ChatCompletionRequest) -> Answer:
        """Answer a chat completion request: a body, or the events of a stream.

        Raises:
            ApiError, InvalidRequest, QueueFull, BackendUnavailable: before the first token.
        """
        info = await self._check(body)
        response_id = f"chatcmpl-{uuid.uuid4().hex}"
        request = await self._in_thread(
            lambda: convert.chat_request(body, response_id, self._tokenizer, info, self._defaults)
        )
        style = self._style(body, response_id, info, request, bool(body.logprobs))
        return await self._answer(body, [request], ChatDialect(style))

    async def completion(self, body: CompletionRequest) -> Answer:
        """Answer a completion request; see ``chat``."""
        info = await self._check(body)
        response_id = f"cmpl-{uuid.uuid4().hex}"
        requests = await self._in_thread(
            lambda: convert.completion_requests(
                body, response_id, self._tokenizer, info, self._defaults
            )
        )
        echo = self._prompt_texts(body, requests) if body.echo else ()
        style = self._style(
            body, response_id, info, requests[0], body.logprobs is not None, echo=echo
        )
        return await self._answer(body, requests, CompletionDialect(style))

    async def _check(self, body: GenerationRequest) -> ModelInfo:
        if body.model != self.model_name:
            raise model_not_found(body.model)
        return await self.info()

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def _style(
        self,
        body: GenerationRequest,
        response_id: str,
        info: ModelInfo,
        request: Request,
        logprobs: bool,
        echo: Sequence[str] = (),
    ) -> Style:
        return Style(
            response_id=response_id,
            model=self.model_name,
            fingerprint=f"fathom-{info.weights_digest[:16]}",
            tokenizer=self._tokenizer,
            logprobs=logprobs,
            depths=bool(body.depths),
            echo=echo,
            n=request.n,
        )

    def _prompt_texts(self, body: CompletionRequest, requests: Sequence[Request]) -> list[str]:
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        if all(isinstance(prompt, str) for prompt in prompts):
            return [str(prompt) for prompt in prompts]
        return [self._tokenizer.decode(request.prompt_token_ids) for request in requests]

    async def _answer(
        self, body: GenerationRequest, requests: Sequence[Request], dialect: Dialect
    ) -> Answer:
        prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
        run = Run(self._backend, requests, RequestTimer(self.metrics, prompt_tokens))
        batches = run.batches()
        # Errors before the first token get an HTTP status of their own, in a stream too.
        first = await self._first(batches)
        if body.stream:
            with_usage = bool(body.stream_options and body.stream_options.include_usage)
            return _events(run, first, batches, dialect, with_usage)
        async with aclosing(batches):
            return await _collect(run, first, batches, dialect)

    async def _first(self, batches: AsyncGenerator[list[Choice], None]) -> list[Choice]:
        """The first batch. The engine's deadline starts at admission, so the queue needs its own.

        Raises:
            ApiError: at the deadline.
        """
        try:
            async with asyncio.timeout(self._defaults.timeout_s):
                return await anext(batches)
        except TimeoutError as error:
            raise deadline_exceeded(
                f"The request had no token after {self._defaults.timeout_s:g} s."
            ) from error
        except StopAsyncIteration as error:
            raise BackendUnavailable("The engine ended the request without an answer.") from error


async def _collect(
    run: Run,
    first: list[Choice],
    batches: AsyncGenerator[list[Choice], None],
    dialect: Dialect,
) -> dict[str, Any]:
    choices: dict[int, Choice] = {}
    batch: list[Choice] | None = first
    while batch is not None:
        for news in batch:
            whole = choices.setdefault(news.index, Choice(news.index, prompt=news.prompt))
            whole.text += news.text
            whole.tokens.extend(news.tokens)
            whole.finish_reason = news.finish_reason
            whole.stop_reason = news.stop_reason
        batch = await anext(batches, None)
    entries = [dialect.whole(choices[index]) for index in sorted(choices)]
    return dialect.envelope(entries, chunk=False, usage=usage_body(run.usages))


async def _events(
    run: Run,
    first: list[Choice],
    batches: AsyncGenerator[list[Choice], None],
    dialect: Dialect,
    with_usage: bool,
) -> AsyncGenerator[str, None]:
    """The events of a stream; an error after the first token becomes an event, then the end."""
    opened: set[int] = set()
    batch: list[Choice] | None = first

    def chunk(entry: dict[str, Any]) -> str:
        body = dialect.envelope([entry], chunk=True)
        if with_usage:
            body["usage"] = None
        return event(body)

    def opening(news: Choice) -> str:
        if news.index in opened:
            return ""
        opened.add(news.index)
        entry = dialect.opening(news)
        return "" if entry is None else chunk(entry)

    try:
        async with aclosing(batches):
            while batch is not None:
                events = ""
                for news in batch:
                    events += opening(news)
                    if _tells(news, dialect.detailed):
                        events += chunk(dialect.delta(news))
                if events:
                    yield events
                batch = await anext(batches, None)
        if with_usage:
            yield event(dialect.envelope([], chunk=True, usage=usage_body(run.usages)))
    except Exception as error:
        yield event(as_api_error(error).body())
    yield DONE


def _tells(news: Choice, detailed: bool) -> bool:
    """Whether a chunk would say anything: text may be held back while tokens arrive."""
    return bool(news.text) or news.finish_reason is not None or (detailed and bool(news.tokens))
