"""The service behind the routes: checks and tokenizes a request, runs it, shapes the answer."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, TypeVar

from fathom.api import convert
from fathom.api.backend import (
    Backend,
    BackendUnavailable,
    ExitState,
    ModelInfo,
    ReplicaReport,
)
from fathom.api.caller import LAST_EVENT_ID, Caller
from fathom.api.errors import deadline_exceeded, model_not_found
from fathom.api.journal import Journal
from fathom.api.promotion import Promoted
from fathom.api.prompts import Tokenizer
from fathom.api.records import Endpoint, Plan
from fathom.api.responses import Choice, Dialect, Style
from fathom.api.run import Run
from fathom.api.schemas import ChatCompletionRequest, CompletionRequest, GenerationRequest
from fathom.api.streams import Streams, body_digest
from fathom.api.usage import usage_body
from fathom.observability.metrics import RequestTimer, ServerMetrics
from fathom.observability.tracing import Tracing
from fathom.tuning.operating_points import OperatingPoints
from fathom.types import ComputePolicy, InvalidRequest, Request

Answer = dict[str, Any] | AsyncGenerator[str, None]
Result = TypeVar("Result")


class Service:
    """Serves one model over a backend.

    Args:
        journal: what keeps streams, if anything, and for how many seconds it does.
        isolate_tenants: callers with different API keys share no KV blocks.

    Attributes:
        model_name: the name that clients ask for. metrics: what this service has measured.
        promoted: the operating points that have been promoted here.
        points_digest: of the operating points at hand; None without any.
        shadow: asks what the shadow of all replicas has found, where there is one: its rate, an
            ``alert`` over all points, ``points`` by name (``exits.drift.PointWatch.figures``), and
            the run in ``mlflow``, if any. None for a moment in which nobody knows.
    """

    shadow: Callable[[], Awaitable[Mapping[str, Any] | None]] | None = None

    def __init__(
        self,
        *,
        backend: Backend,
        tokenizer: Tokenizer,
        model_name: str,
        defaults: convert.Defaults,
        journal: Journal | None = None,
        keep_streams_s: float = 60.0,
        isolate_tenants: bool = False,
    ) -> None:
        self.model_name = model_name
        self.metrics = ServerMetrics(model_name)
        self._backend = backend
        self._tokenizer = tokenizer
        self._started = self._defaults = defaults
        self.promoted = Promoted()
        self.points_digest = defaults.points.digest if defaults.points else None
        self._isolate_tenants = isolate_tenants
        self._streams = Streams(backend, tokenizer, self.metrics, journal, keep_streams_s)
        self._info: ModelInfo | None = None
        # One thread: long prompts do not stop the event loop, and the tokenizer is never shared.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="tokenize")

    async def reports(self) -> Sequence[ReplicaReport]:
        """The reports of all replicas that answer."""
        reports = await self._backend.reports()
        if reports:  # replicas come and go: what is known of the model is what they say now
            self._info = min((r.info for r in reports), key=lambda info: info.max_model_len)
        return reports

    @property
    def points(self) -> OperatingPoints | None:
        """The operating points that requests can name, if there are any."""
        return self._defaults.points

    @property
    def default_compute(self) -> ComputePolicy:
        """The policy of requests that name none."""
        return self._defaults.compute

    def take(self, promoted: Promoted) -> None:
        """Give requests from now on what has been promoted.

        Raises:
            ConfigError: for a point that cannot be taken; nothing changes then.
        """
        own, started = promoted.current, self._started
        if own is None:
            points, compute, digest = started.points, started.compute, None
            digest = points.digest if points else None
        else:
            points, digest = own.points, own.digest
            compute = own.default_compute(started.compute)
        self._defaults = dataclasses.replace(started, compute=compute, points=points)
        self.points_digest = digest
        self.promoted = promoted

    async def exit_states(self) -> Sequence[ExitState]:
        """What the exit policies of all replicas that answer have seen."""
        return await self._backend.exit_states()

    def trace(self, tracing: Tracing) -> None:
        """Trace requests from now on."""
        self._streams.tracing = tracing

    async def shadow_state(self) -> Mapping[str, Any] | None:
        """See ``shadow``; None without one."""
        return None if self.shadow is None else await self.shadow()

    async def info(self) -> ModelInfo:
        """What is known of the model.

        Raises:
            BackendUnavailable: if no replica has answered yet.
        """
        if self._info is None:
            await self.reports()
        if self._info is None:
            raise BackendUnavailable("No engine is up yet; try again in a few seconds.")
        return self._info

    async def chat(self, body: ChatCompletionRequest, caller: Caller) -> Answer:
        """Answer a chat completion request: a body, or the events of a stream.

        Raises:
            ApiError, InvalidRequest, QueueFull, BackendUnavailable: before the first token.
        """
        self._check(body, caller)
        if (rest := await self._rest("chat", body, caller)) is not None:
            return rest
        info = await self.info()
        response_id = f"chatcmpl-{uuid.uuid4().hex}"
        request = await self._in_thread(
            lambda: convert.chat_request(body, response_id, self._tokenizer, info, self._defaults)
        )
        style = self._style(body, response_id, info, request, bool(body.logprobs))
        return await self._answer("chat", body, caller, [request], style)

    async def completion(self, body: CompletionRequest, caller: Caller) -> Answer:
        """Answer a completion request; see ``chat``."""
        self._check(body, caller)
        if (rest := await self._rest("completion", body, caller)) is not None:
            return rest
        info = await self.info()
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
        return await self._answer("completion", body, caller, requests, style)

    async def stream(self, caller: Caller) -> Answer:
        """The rest of the stream that ``caller.request_id`` names, for who has not its body.

        Raises:
            ApiError: see ``Streams.find`` and ``Streams.go_on``.
        """
        taken = await self._streams.find(caller, None)
        assert taken is not None
        return self._streams.go_on(taken, caller, self._fingerprint)

    def _check(self, body: GenerationRequest, caller: Caller) -> None:
        if body.model != self.model_name:
            raise model_not_found(body.model)
        if caller.last_event_id is not None and not body.stream:
            raise InvalidRequest(
                f"{LAST_EVENT_ID} ({caller.last_event_id}) needs stream to be true: only a stream "
                "can be gone on with.",
                param=LAST_EVENT_ID,
            )

    async def _rest(
        self, endpoint: Endpoint, body: GenerationRequest, caller: Caller
    ) -> Answer | None:
        """The rest of the stream that this request asks for again, if it does."""
        if not body.stream:
            return None
        taken = await self._streams.find(caller, body_digest(endpoint, body))
        return None if taken is None else self._streams.go_on(taken, caller, self._fingerprint)

    @property
    def _fingerprint(self) -> str:
        return "" if self._info is None else fingerprint(self._info)

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
            fingerprint=fingerprint(info),
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
        self,
        endpoint: Endpoint,
        body: GenerationRequest,
        caller: Caller,
        requests: Sequence[Request],
        style: Style,
    ) -> Answer:
        plan = Plan(
            key=(caller.owner, caller.request_id),
            body=body_digest(endpoint, body) if body.stream else b"",
            endpoint=endpoint,
            style=style,
            requests=tuple(self._from(caller, request) for request in requests),
            with_usage=bool(body.stream_options and body.stream_options.include_usage),
            started=time.time(),
        )
        prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
        timer = RequestTimer(self.metrics, prompt_tokens)
        tracing = self._streams.tracing
        span = tracing.begin(caller, plan) if tracing else None
        run = Run(self._backend, plan.requests, timer, span=span)
        batches = run.batches()
        # Errors before the first token get an HTTP status of their own, in a stream too.
        first = await self._first(batches)
        if body.stream:
            return self._streams.begin(plan, run, batches, first, ids=caller.event_ids)
        async with aclosing(batches):
            return await _collect(run, first, batches, self._streams.dialect(plan))

    def _from(self, caller: Caller, request: Request) -> Request:
        """A request with what its caller adds, and a seed, so that it can go on elsewhere."""
        sampling = request.sampling
        if sampling.seed is None:
            sampling = dataclasses.replace(sampling, seed=secrets.randbits(62))
        salt = request.cache_salt
        if self._isolate_tenants:
            salt = f"{caller.tenant}:{salt}"
        return dataclasses.replace(
            request, sampling=sampling, session_id=caller.session_id, cache_salt=salt
        )

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


def fingerprint(info: ModelInfo) -> str:
    """The ``system_fingerprint`` of a model's answers."""
    return f"fathom-{info.weights_digest[:16]}"
