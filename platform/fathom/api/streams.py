"""The streams of one ingress: begun, kept for clients that come back, and gone on with."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import AsyncGenerator

from fathom.api.backend import Backend
from fathom.api.caller import Caller
from fathom.api.errors import (
    event_not_found,
    journal_unavailable,
    model_changed,
    other_body,
    stream_not_found,
)
from fathom.api.journal import Journal, JournalLost, NotTaken, Taken
from fathom.api.prompts import Tokenizer
from fathom.api.records import Endpoint, Plan, events_after, given_by, rest_of
from fathom.api.responses import ChatDialect, Choice, CompletionDialect, Dialect
from fathom.api.run import Run
from fathom.api.schemas import GenerationRequest
from fathom.api.scribe import Scribe
from fathom.api.stream import StreamWriter, as_events, to_the_end
from fathom.observability.metrics import RequestTimer, ServerMetrics
from fathom.observability.tracing import Tracing


class Streams:
    """Runs streams, and keeps them in a journal if there is one.

    Args:
        journal: None keeps nothing, and numbers no events.
        keep_s: seconds for which the journal keeps a stream.

    Attributes:
        tracing: what traces requests, if anything does.
    """

    tracing: Tracing | None = None

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        metrics: ServerMetrics,
        journal: Journal | None,
        keep_s: float,
    ) -> None:
        self._backend = backend
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._scribe = None
        if journal is not None:
            self._scribe = Scribe(journal, keep_s=keep_s, on_loss=metrics.journal_losses.inc)

    def dialect(self, plan: Plan) -> Dialect:
        """How the stream of a plan speaks."""
        kind = ChatDialect if plan.endpoint == "chat" else CompletionDialect
        return kind(plan.style, self._tokenizer)

    async def find(self, caller: Caller, body: bytes | None) -> Taken | None:
        """Take over the stream that a request goes on with; None if it is a new one.

        Args:
            body: digest of the request's body; None where the caller sent none.

        Raises:
            ApiError: 404 if the caller saw events of a stream that is not there; 409 if it sent
                another body; 503 if nobody can tell.
        """
        seen = caller.last_event_id
        must_be_there = seen is not None or body is None
        if self._scribe is not None:
            key = (caller.owner, caller.request_id)
            try:
                found = await self._scribe.take(
                    key, after=seen or 0, body=body, patient=must_be_there
                )
            except JournalLost as error:
                if must_be_there:
                    raise journal_unavailable() from error
                return None
            match found:
                case Taken():
                    return found
                case NotTaken.OTHER_BODY:
                    raise other_body(caller.request_id)
                case NotTaken.BEHIND:
                    raise event_not_found(seen or 0)
        if must_be_there:
            raise stream_not_found(caller.request_id)
        return None

    def begin(
        self,
        plan: Plan,
        run: Run,
        batches: AsyncGenerator[list[Choice], None],
        first: list[Choice],
        *,
        ids: bool = True,
    ) -> AsyncGenerator[str, None]:
        """The events of a new stream.

        Args:
            first: the batch that was read already.
            ids: leave the events' ids in. The journal has them in any case.
        """
        number = None if self._scribe is None else 0
        writer = StreamWriter(self.dialect(plan), with_usage=plan.with_usage, number=number)
        news = writer.news(run, batches, first)
        return to_the_end(
            as_events(news) if self._scribe is None else self._scribe.write(news, plan), ids=ids
        )

    def go_on(self, taken: Taken, caller: Caller, fingerprint: str) -> AsyncGenerator[str, None]:
        """The events of a stream that the caller has not seen: sent before, and then new ones.

        Args:
            fingerprint: of the model that is served now; empty if that is not known.

        Raises:
            ApiError: 409 if another model began the stream.
        """
        assert self._scribe is not None
        plan, given = taken.plan, given_by(taken.news)
        self._metrics.streams_resumed.inc()
        missed = events_after(taken.news, caller.last_event_id or 0)
        if taken.ended:
            return to_the_end(_nothing(), *missed, ids=caller.event_ids)
        if fingerprint and fingerprint != plan.style.fingerprint:
            raise model_changed()
        requests = rest_of(plan, given, taken.epoch, time.time())
        span = self.tracing.begin(caller, plan) if self.tracing else None
        run = Run(self._backend, requests, RequestTimer(self._metrics, 0), given, span)
        writer = StreamWriter(
            self.dialect(plan),
            with_usage=plan.with_usage,
            number=sum(len(piece.events) for piece in taken.news),
            opened=given,
        )
        news = writer.news(run, run.batches(), None)
        return to_the_end(self._scribe.write(news, plan, taken), *missed, ids=caller.event_ids)


def body_digest(endpoint: Endpoint, body: GenerationRequest) -> bytes:
    """SHA-256 of what a request asks for; how its JSON is laid out makes no difference."""
    asked = json.dumps(body.model_dump(exclude_none=True), sort_keys=True)
    return hashlib.sha256(f"{endpoint} {asked}".encode()).digest()


async def _nothing() -> AsyncGenerator[str, None]:
    return
    yield
