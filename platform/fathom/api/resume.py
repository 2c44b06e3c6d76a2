"""A request outlives the replicas at work on it: it goes on elsewhere, from what was delivered."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

from fathom.api.backend import BackendUnavailable
from fathom.types import InvalidRequest, Request, RequestOutput, Resumed

logger = logging.getLogger("fathom.api")

GIVE_UP_S = 60.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0
_GRACE_S = 1.0
"""An engine ends a request at its deadline by itself, and says so better than we could."""

Attempt = Callable[[Request], AsyncGenerator[list[RequestOutput], None]]


class ReplicaLost(RuntimeError):
    """The replica at work on a request has gone; the message says what is known of it."""


class Delivered:
    """What the caller of a request has: nothing of it may get lost or come twice.

    Attributes:
        resumptions: times that the request went on elsewhere.
        plight: why the replica that gave the latest news cannot go on, or None.
    """

    def __init__(self, request: Request) -> None:
        params = request.sampling
        if params.seed is None:  # every engine would choose another
            params = dataclasses.replace(params, seed=secrets.randbits(62))
        self._request = dataclasses.replace(request, sampling=params)
        given = request.resumed or (Resumed(),) * request.n
        self._ids = [list(each.token_ids) for each in given]
        self._depths = [list(each.depths) for each in given]
        self._finished = [each.finished for each in given]
        self.resumptions = int(bool(request.resumed))
        self.plight: str | None = None

    @property
    def done(self) -> bool:
        """Whether every completion has ended."""
        return all(self._finished)

    @property
    def num_tokens(self) -> int:
        """Tokens that were delivered, of all completions."""
        return sum(map(len, self._ids))

    def first(self) -> Request:
        """The request as the first replica gets it."""
        return self._request

    def rest(self, timeout_s: float | None) -> Request:
        """The request as another replica gets it, under a name that no orphan of it has.

        Args:
            timeout_s: what is left of its time.
        """
        resumed = self._request.resumed
        if self.num_tokens or any(self._finished):
            resumed = tuple(
                Resumed(tuple(ids), tuple(depths), finished)
                for ids, depths, finished in zip(
                    self._ids, self._depths, self._finished, strict=True
                )
            )
        return dataclasses.replace(
            self._request,
            request_id=f"{self._request.request_id}-{secrets.token_hex(4)}",
            timeout_s=timeout_s,
            resumed=resumed,
        )

    def take(self, batch: list[RequestOutput]) -> list[RequestOutput]:
        """Note a replica's news; returns them as the caller is to see them.

        An end that is only the replica's plight is taken out of them.
        """
        self.plight = None
        news: list[RequestOutput] = []
        for out in batch:
            if out.retriable:
                self.plight = out.error or "its engine cannot go on"
                out = dataclasses.replace(
                    out, finish_reason=None, error=None, usage=None, retriable=False
                )
                if not (out.tokens or out.text):
                    continue
            self._ids[out.index] += [token.id for token in out.tokens]
            self._depths[out.index] += [token.depth for token in out.tokens]
            self._finished[out.index] = out.finish_reason is not None
            if out.usage is not None:  # which knows of the latest replica only
                out.usage.compute.resumptions = self.resumptions
            out.request_id = self._request.request_id
            news.append(out)
        return news


async def resuming(
    request: Request,
    attempt: Attempt,
    *,
    give_up_s: float = GIVE_UP_S,
    on_resumption: Callable[[], None] = lambda: None,
) -> AsyncGenerator[list[RequestOutput], None]:
    """Run a request, at another replica whenever the one at work is lost.

    Args:
        attempt: runs it at a replica; raises ``ReplicaLost`` for any loss. Closed when this is.
        give_up_s: seconds after a loss in which nothing comes from anywhere.
        on_resumption: called when a request has gone on elsewhere.

    Raises:
        BackendUnavailable: if no replica goes on with it in that time, or before its deadline.
        Whatever ``attempt`` raises, after everything that came before it.
    """
    clock = asyncio.get_running_loop().time
    delivered = Delivered(request)
    deadline = math.inf if request.timeout_s is None else clock() + request.timeout_s
    here, loss = delivered.first(), ReplicaLost("")
    until, pause = math.inf, FIRST_PAUSE_S  # a first try takes what time it needs
    while True:
        try:
            async with aclosing(attempt(here)) as batches:
                while (batch := await _next(batches, until)) is not None:
                    if until < math.inf:
                        until, pause = math.inf, FIRST_PAUSE_S
                        delivered.resumptions += 1
                        on_resumption()
                    news = delivered.take(batch)
                    if news:
                        yield news
                    if delivered.plight is not None:
                        raise ReplicaLost(delivered.plight)
            if delivered.done:
                return
            raise ReplicaLost("its stream ended early")
        except ReplicaLost as error:
            if delivered.done:
                return
            loss = error
        except TimeoutError:
            if until == math.inf:  # not ours
                raise
            raise _nothing_left(delivered, loss, request, give_up_s) from loss
        except InvalidRequest as error:
            if until == math.inf:
                raise
            raise BackendUnavailable(
                f"The replica at work on this request was lost ({loss}), and another one refuses "
                f"to go on: {error}"
            ) from error
        if until == math.inf:
            until = min(clock() + give_up_s, deadline + _GRACE_S)
        if clock() + pause >= min(until, deadline):
            raise _nothing_left(delivered, loss, request, give_up_s) from loss
        logger.warning(
            "Request %s lost its replica after %d tokens (%s) and is tried elsewhere.",
            request.request_id, delivered.num_tokens, loss,
        )  # fmt: skip
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)
        here = delivered.rest(None if deadline == math.inf else deadline - clock())


async def _next(
    batches: AsyncIterator[list[RequestOutput]], until: float
) -> list[RequestOutput] | None:
    """The next batch, or None at the end.

    Raises:
        TimeoutError: if nothing has come at the time ``until`` of the event loop's clock.
    """
    if until == math.inf:
        return await anext(batches, None)
    async with asyncio.timeout_at(until):
        return await anext(batches, None)


def _nothing_left(
    delivered: Delivered, loss: ReplicaLost, request: Request, give_up_s: float
) -> BackendUnavailable:
    timeout_s = math.inf if request.timeout_s is None else request.timeout_s
    limit = f"{give_up_s:g} s"
    if timeout_s < give_up_s:
        limit = f"the {timeout_s:g} s that it had"
    return BackendUnavailable(
        f"The replica at work on this request was lost ({loss}) after {delivered.num_tokens} "
        f"tokens, and none went on with it within {limit}; try again."
    )
