"""The shallow replica's end: a deep stage that is somewhere else."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight

from fathom.attention.paged_cache import PagedKVCache
from fathom.dataplane import protocol
from fathom.dataplane.protocol import BlockOp, Flush, Hello, ProtocolError, Tls
from fathom.engine.deep import DeepLost, FlushItem, FlushResult

DEADLINE_S = 30.0
"""Longest that a flush may take, its way included."""

GIVE_UP_S = 15.0
"""Longest that a lost deep stage is replaced by another before requests fail."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0


@dataclass(frozen=True, slots=True)
class _Away:
    number: int
    outputs: int
    answer: Future[FlushResult]
    deadline: float


class RemoteDeepStage:
    """A deep stage behind an exchange; see ``fathom.engine.deep.DeepStage``.

    The tables of the leased blocks are kept here, so that scheduling asks nobody. What has to
    happen to blocks (copies on write, scrubbing) travels with the next flush.

    Args:
        peers: gives the addresses of the deep replicas that there are now, the preferred first.
        hello, token, tls, deadline_s: see ``Exchange``.
        give_up_s: how long ``reopen`` looks for a peer.

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
    ) -> None:
        self._peers = peers
        self._hello = hello
        self._give_up_s = give_up_s
        self._options: dict[str, Any] = {"token": token, "tls": tls, "deadline_s": deadline_s}
        self._ops = _Ops()
        # Block 0 is the null block, which nobody is leased.
        self._cache = PagedKVCache(hello.num_blocks + 1, hello.block_size, self._ops)
        self._exchange = self._connect()

    @property
    def cache(self) -> PagedKVCache:
        """Tables of the leased blocks."""
        return self._cache

    @property
    def may_be_lost(self) -> bool:
        """See ``DeepStage.may_be_lost``."""
        return True

    def flush(self, items: Sequence[FlushItem]) -> Future[FlushResult]:
        """See ``DeepStage.flush``."""
        return self._exchange.flush(items, self._ops.take())

    def reopen(self) -> None:
        """See ``DeepStage.reopen``: tries every peer, again and again with longer pauses."""
        self._exchange.close()
        self._ops.take()
        self._cache.clear()
        deadline, pause = time.monotonic() + self._give_up_s, _FIRST_PAUSE_S
        while True:
            try:
                self._exchange = self._connect()
                return
            except DeepLost:
                if time.monotonic() + pause > deadline:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def close(self) -> None:
        """Leave; flushes that are away fail."""
        self._exchange.close()

    def _connect(self) -> Exchange:
        reasons = []
        for address in self._peers():
            try:
                return Exchange(address, self._hello, **self._options)
            except DeepLost as error:
                reasons.append(str(error))
        raise DeepLost("; ".join(reasons) or "there is no deep replica")


class Exchange:
    """One connection to a deep replica: flushes go out, answers come in, in order.

    Sending and receiving have a thread each: a peer that hangs blocks neither the engine nor the
    watch over deadlines.

    Args:
        address: of a ``DeepServer``. hello: what both ends must agree on; its ``num_blocks`` are
            leased.
        token: of the deployment. tls: the authority's certificate, for ``grpc+tls``.
        deadline_s: longest that a flush may take.

    Raises:
        DeepLost: if the peer cannot be reached, refuses the token, or its model is another.
    """

    def __init__(
        self, address: str, hello: Hello, *, token: str, tls: Tls | None, deadline_s: float
    ) -> None:
        self._address = address
        self._hello = hello
        self._deadline_s = deadline_s
        self._lost: DeepLost | None = None
        self._away: deque[_Away] = deque()
        self._lock = threading.Lock()
        self._outbox: queue.SimpleQueue[Flush | None] = queue.SimpleQueue()
        self._number = 0
        self._connect(token, tls)
        for target in (self._send, self._receive, self._watch):
            threading.Thread(target=target, name=f"fathom{target.__name__}", daemon=True).start()

    def flush(self, items: Sequence[FlushItem], ops: Sequence[BlockOp]) -> Future[FlushResult]:
        """Send a flush; ``DeepLost`` in the future says that the connection has ended."""
        answer: Future[FlushResult] = Future()
        outputs = sum(item.num_outputs for item in items)
        with self._lock:
            if self._lost is not None:
                answer.set_exception(self._lost)
                return answer
            deadline = time.monotonic() + self._deadline_s
            self._away.append(_Away(self._number, outputs, answer, deadline))
            self._outbox.put(Flush(self._number, ops, items))
            self._number += 1
        return answer

    def close(self) -> None:
        """Leave; flushes that are away fail."""
        self._fail("the connection was closed here")

    def _connect(self, token: str, tls: Tls | None) -> None:
        options = {} if tls is None else {"tls_root_certs": tls.certificate}
        try:
            self._client = flight.FlightClient(self._address, **options)
            call = flight.FlightCallOptions(
                headers=[(b"authorization", f"Bearer {token}".encode())]
            )
            descriptor = flight.FlightDescriptor.for_command(self._hello.encode())
            self._writer, self._reader = self._client.do_exchange(descriptor, call)
            self._writer.begin(protocol.FLUSH_SCHEMA)
            with _Cancel(self._reader, self._deadline_s):
                protocol.decode_lease(*_read(self._reader))
        except (pa.ArrowException, OSError, ProtocolError, StopIteration) as error:
            raise DeepLost(f"{self._address}: {_words(error)}") from error

    # Threads

    def _send(self) -> None:
        while (flush := self._outbox.get()) is not None:
            try:
                batch, header = protocol.encode_flush(flush)
                self._writer.write_with_metadata(batch, header)
            except Exception as error:
                self._fail(_words(error))
                break
        with contextlib.suppress(pa.ArrowException, OSError):
            self._writer.close()

    def _receive(self) -> None:
        while True:
            try:
                batch, header = _read(self._reader)
                number, logits, error = protocol.decode_answer(batch, header, self._hello)
                with self._lock:
                    if self._lost is not None:
                        return None
                    away = self._away.popleft()
                if number != away.number:
                    raise ProtocolError(f"answer {number} came in place of {away.number}.")
                if logits is not None and len(logits) != away.outputs:
                    raise ProtocolError(f"{len(logits)} rows came in place of {away.outputs}.")
            except StopIteration:
                return self._fail("the peer ended the exchange")
            except (pa.ArrowException, OSError, ProtocolError, IndexError) as problem:
                return self._fail(_words(problem))
            if logits is None:
                away.answer.set_exception(RuntimeError(error))
            else:
                away.answer.set_result(FlushResult(logits))

    def _watch(self) -> None:
        """Give a peer up that does not answer in time: it may hang with its connection open."""
        pause = min(1.0, self._deadline_s / 4)
        while self._lost is None:
            time.sleep(pause)
            with self._lock:
                late = bool(self._away) and self._away[0].deadline < time.monotonic()
            if late:
                self._fail(f"no answer within {self._deadline_s:g} s")

    def _fail(self, reason: str) -> None:
        """End the connection; what is away fails."""
        with self._lock:
            if self._lost is not None:
                return
            self._lost = DeepLost(f"{self._address}: {reason}")
            away = list(self._away)
            self._away.clear()
        for each in away:
            each.answer.set_exception(self._lost)
        self._outbox.put(None)
        self._reader.cancel()  # lets threads go that wait for the peer


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


class _Cancel:
    """Cancels a read that takes too long."""

    def __init__(self, reader: Any, seconds: float) -> None:
        self._timer = threading.Timer(seconds, reader.cancel)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *exception: object) -> None:
        self._timer.cancel()


def _read(reader: Any) -> tuple[pa.RecordBatch, bytes]:
    batch, header = reader.read_chunk()
    return batch, b"" if header is None else header.to_pybytes()


def _words(error: BaseException) -> str:
    """A Flight error without gRPC's context behind it."""
    return str(error).partition(". gRPC client debug context")[0].strip() or type(error).__name__
