"""The shallow replica's end: a deep stage that is somewhere else."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from fathom.attention.paged_cache import PagedKVCache
from fathom.dataplane.exchange import Exchange
from fathom.dataplane.protocol import BlockOp, Hello, KeyedBlocks, Reply
from fathom.dataplane.tls import Tls
from fathom.engine.deep import DeepLost, FlushItem, FlushResult
from fathom.kvstore.keys import BlockKey

DEADLINE_S = 30.0
"""Longest that a flush may take, its way included."""

GIVE_UP_S = 15.0
"""Longest that a lost deep stage is replaced by another before requests fail."""

_LATEST = 64
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0

Connected = TypeVar("Connected")


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of a flush went.

    Attributes:
        total_s: from sending it to its answer. pass_s: of the deep pass. queue_s: before it.
        rows, sequences: of the flush.
    """

    total_s: float
    pass_s: float
    queue_s: float
    rows: int
    sequences: int


class RemoteDeepStage:
    """A deep stage behind an exchange; see ``fathom.engine.deep.DeepStage``.

    The tables of the leased blocks are kept here, so that scheduling asks nobody. What has to
    happen to blocks (copies on write, scrubbing) travels with the next flush.

    Args:
        peers: gives the addresses of the deep replicas that there are now, the preferred first.
        hello, token, tls, deadline_s: see ``Exchange``.
        give_up_s: how long ``reopen`` looks for a peer.
        on_lost: told the address of a peer that does not take the connection, or is lost.

    Attributes:
        timings: of the latest flushes.

    Raises:
        DeepLost: if no peer takes the connection, with each one's reason.
    """

    def __init__(
        self,
        peers: Callable[[], Sequence[str]],
        hello: Hello,
        *,
        token: str,
        tls: Tls | None = None,
        deadline_s: float = DEADLINE_S,
        give_up_s: float = GIVE_UP_S,
        on_lost: Callable[[str], None] = lambda address: None,
    ) -> None:
        self._peers = peers
        self._on_lost = on_lost
        self._hello = hello
        self._give_up_s = give_up_s
        self._options: dict[str, Any] = {"token": token, "tls": tls, "deadline_s": deadline_s}
        self._ops = _Ops()
        self._reopened = 0
        self.timings: deque[Timing] = deque(maxlen=4096)
        # Block 0 is the null block, which nobody is leased.
        self._cache = PagedKVCache(hello.num_blocks + 1, hello.block_size, self._ops)
        self._exchange = self._connect()

    @classmethod
    def when_there(
        cls, peers: Callable[[], Sequence[str]], hello: Hello, *, wait_s: float, **options: Any
    ) -> RemoteDeepStage:
        """Connect to the first peer that takes the connection, within ``wait_s`` seconds.

        Raises:
            DeepLost: see the constructor.
        """
        return _retry(lambda: cls(peers, hello, **options), wait_s)

    @property
    def cache(self) -> PagedKVCache:
        """Tables of the leased blocks."""
        return self._cache

    @property
    def may_be_lost(self) -> bool:
        """See ``DeepStage.may_be_lost``."""
        return True

    @property
    def costs(self) -> Sequence[tuple[int, float]]:
        """(rows, seconds) of a deep pass, as the peer measured it at its start."""
        return self._exchange.lease.costs

    def flush(self, items: Sequence[FlushItem]) -> Future[FlushResult]:
        """See ``DeepStage.flush``."""
        answer: Future[FlushResult] = Future()
        sent = time.perf_counter()

        def take(done: Future[Reply]) -> None:
            error = done.exception()
            if error is not None:
                answer.set_exception(error)
                return
            reply = done.result()
            if reply.result is None:
                answer.set_exception(RuntimeError(reply.error))
                return
            total_s = time.perf_counter() - sent
            rows = sum(len(item.hidden) for item in items)
            self.timings.append(Timing(total_s, reply.pass_s, reply.queue_s, rows, len(items)))
            answer.set_result(reply.result)

        self._exchange.send(self._ops.take(), items).add_done_callback(take)
        return answer

    def load(self, blocks: Sequence[int], keys: Sequence[BlockKey]) -> Future[int]:
        """See ``DeepStage.load``."""
        answer: Future[int] = Future()

        def take(done: Future[Reply]) -> None:
            answer.set_result(0 if done.exception() is not None else done.result().loaded)

        sent = self._exchange.send(self._ops.take(), (), load=KeyedBlocks(list(blocks), list(keys)))
        sent.add_done_callback(take)
        return answer

    def publish(self, blocks: Sequence[int], keys: Sequence[BlockKey]) -> None:
        """See ``DeepStage.publish``. Goes at once: there may be no other flush for long."""
        self._exchange.send(self._ops.take(), (), publish=[KeyedBlocks(list(blocks), list(keys))])

    @property
    def address(self) -> str:
        """Of the peer."""
        return self._exchange.address

    def stats(self) -> dict[str, float]:
        """Figures of this end; seconds are means over the latest flushes."""
        latest = list(self.timings)[-_LATEST:]
        count = max(len(latest), 1)
        return {
            "flushes_away": self._exchange.num_away,
            "deep_reopens": self._reopened,
            "flush_seconds": sum(each.total_s for each in latest) / count,
            "flush_queue_seconds": sum(each.queue_s for each in latest) / count,
            "deep_pass_seconds": sum(each.pass_s for each in latest) / count,
        }

    def reopen(self) -> None:
        """See ``DeepStage.reopen``: tries every peer, again and again with longer pauses."""
        self._on_lost(self._exchange.address)
        self._exchange.close()
        self._ops.take()
        self._cache.clear()
        self._exchange = _retry(self._connect, self._give_up_s)
        self._reopened += 1

    def close(self) -> None:
        """Leave; flushes that are away fail."""
        self._exchange.close()

    def _connect(self) -> Exchange:
        reasons = []
        for address in self._peers():
            try:
                return Exchange(address, self._hello, **self._options)
            except DeepLost as error:
                self._on_lost(address)
                reasons.append(str(error))
        raise DeepLost("; ".join(reasons) or "there is no deep replica")


def _retry(attempt: Callable[[], Connected], give_up_s: float) -> Connected:
    """Try again and again, with longer pauses, until ``give_up_s`` seconds have passed.

    Raises:
        DeepLost: of the last attempt.
    """
    deadline, pause = time.monotonic() + give_up_s, _FIRST_PAUSE_S
    while True:
        try:
            return attempt()
        except DeepLost:
            if time.monotonic() + pause > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


class _Ops:
    """Block operations that wait for the next flush; see ``BlockStorage``."""

    def __init__(self) -> None:
        self._ops: list[BlockOp] = []

    def copy_block(self, source: int, target: int) -> None:
        """Note a copy."""
        self._ops.append(BlockOp(target, source))

    def zero_block(self, block: int) -> None:
        """Note a scrubbing."""
        self._ops.append(BlockOp(block))

    def take(self) -> list[BlockOp]:
        """What was noted since the last call, in order."""
        ops, self._ops = self._ops, []
        return ops
