"""One connection from a shallow replica to a deep one: flushes go out, replies come in."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight

from fathom.dataplane import messages
from fathom.dataplane.protocol import (
    BlockOp,
    Flush,
    Hello,
    KeyedBlocks,
    Lease,
    ProtocolError,
    Reply,
)
from fathom.dataplane.tls import Tls
from fathom.engine.deep import DeepLost, FlushItem

_SMALL = 64
"""Rows of a flush that fits into a connection's buffers, whatever its peer does."""

SILENCE_S = 5.0
"""A peer that says nothing for so long hangs: a server gives a sign of life every second."""


@dataclass(frozen=True, slots=True)
class _Away:
    flush: Flush
    answer: Future[Reply]
    sent: float


class Exchange:
    """One connection to a deep replica.

    Receiving has a thread, and so has sending what is large: a peer that hangs blocks neither the
    engine nor the watch over deadlines.

    Args:
        address: of a ``DeepServer``. hello: what both ends must agree on; its ``num_blocks`` are
            leased.
        token: of the deployment. tls: the authority's certificate, for ``grpc+tls``.
        deadline_s: longest that a flush may take.

    Attributes:
        address: of the peer. lease: what it has granted.

    Raises:
        DeepLost: if the peer cannot be reached, refuses the token, or its model is another.
    """

    def __init__(
        self, address: str, hello: Hello, *, token: str, tls: Tls | None, deadline_s: float
    ) -> None:
        self.address = address
        self._hello = hello
        self._deadline_s = deadline_s
        self._lost: DeepLost | None = None
        self._away: dict[int, _Away] = {}
        self._lock = threading.Lock()
        self._outbox: queue.SimpleQueue[Flush | None] = queue.SimpleQueue()
        self._number = self._queued = 0
        self._heard = time.monotonic()
        self.lease = self._connect(token, tls)
        for target in (self._send, self._receive, self._watch):
            threading.Thread(target=target, name=f"fathom{target.__name__}", daemon=True).start()

    @property
    def num_away(self) -> int:
        """Flushes that are awaited."""
        return len(self._away)

    def send(
        self,
        ops: Sequence[BlockOp],
        items: Sequence[FlushItem],
        *,
        publish: Sequence[KeyedBlocks] = (),
        load: KeyedBlocks | None = None,
    ) -> Future[Reply]:
        """Send a flush; ``DeepLost`` in the future says that the connection has ended.

        To be called from one thread alone.
        """
        answer: Future[Reply] = Future()
        with self._lock:
            lost = self._lost
            if lost is None:
                flush = Flush(self._number, ops, items, publish, load)
                self._away[flush.number] = _Away(flush, answer, time.monotonic())
                self._number += 1
                # Waking the thread takes as long as a small flush does; a large one may block.
                at_once = not self._queued and sum(len(item.hidden) for item in items) <= _SMALL
                if not at_once:
                    self._queued += 1
                    self._outbox.put(flush)
        if lost is not None:
            answer.set_exception(lost)
        elif at_once:
            self._write(flush)
        return answer

    def close(self) -> None:
        """Leave; flushes that are away fail."""
        self._fail("the connection was closed here")

    def _connect(self, token: str, tls: Tls | None) -> Lease:
        limit_s = min(self._deadline_s, SILENCE_S)
        options: dict[str, Any] = {} if tls is None else {"tls_root_certs": tls.certificate}
        # Also how long gRPC lets a connection come up, else 20 s: a process that hangs is connected
        # to by its kernel, and says nothing.
        options["generic_options"] = [("grpc.min_reconnect_backoff_ms", math.ceil(1000 * limit_s))]
        try:
            self._client = flight.FlightClient(self.address, **options)
            call = flight.FlightCallOptions(
                headers=[(b"authorization", f"Bearer {token}".encode())]
            )
            descriptor = flight.FlightDescriptor.for_command(self._hello.encode())
            self._writer, self._reader = self._client.do_exchange(descriptor, call)
            self._writer.begin(messages.SCHEMA)
            with _Cancel(self._reader, limit_s):
                return messages.decode_lease(*_read(self._reader))
        except (pa.ArrowException, OSError, ProtocolError, StopIteration) as error:
            raise DeepLost(f"{self.address}: {_words(error)}") from error

    # Threads

    def _send(self) -> None:
        while (flush := self._outbox.get()) is not None:
            self._write(flush)
            with self._lock:
                self._queued -= 1
        with contextlib.suppress(pa.ArrowException, OSError):
            self._writer.close()

    def _write(self, flush: Flush) -> None:
        try:
            batch, header = messages.encode_flush(flush)
            self._writer.write_with_metadata(batch, header)
        except Exception as error:
            self._fail(_words(error))

    def _receive(self) -> None:
        while True:
            try:
                batch, header = _read(self._reader)
                reply = messages.decode_reply(batch, header, self._hello)
                self._heard = time.monotonic()
                if reply is None:
                    continue
                with self._lock:
                    if self._lost is not None:
                        return None
                    away = self._away.pop(reply.number, None)
                if away is None:
                    raise ProtocolError(f"reply {reply.number} answers nothing.")
                outputs = sum(item.num_outputs for item in away.flush.items)
                rows = sum(item.num_logits for item in away.flush.items)
                result = reply.result
                if result and (len(result.best), len(result.logits)) != (outputs, rows):
                    raise ProtocolError(
                        f"{len(result.best)} outputs and {len(result.logits)} rows of logits came "
                        f"in place of {outputs} and {rows}."
                    )
            except StopIteration:
                return self._fail("the peer ended the exchange")
            except (pa.ArrowException, OSError, ValueError, KeyError) as problem:
                return self._fail(_words(problem))
            away.answer.set_result(reply)

    def _watch(self) -> None:
        """Give a peer up that hangs: its connection may well stay open."""
        pause = min(0.5, self._deadline_s / 4)
        before = time.monotonic()
        while self._lost is None:
            time.sleep(pause)
            now = time.monotonic()
            if now - before > pause + 1.0:  # it is this process that was stopped
                self._heard = now
            before = now
            with self._lock:
                first = next(iter(self._away.values()), None)
            if first is not None and first.sent + self._deadline_s < now:
                self._fail(f"no answer within {self._deadline_s:g} s")
            elif now - self._heard > SILENCE_S:
                self._fail(f"no sign of life for {SILENCE_S:g} s")

    def _fail(self, reason: str) -> None:
        """End the connection; what is away fails."""
        with self._lock:
            if self._lost is not None:
                return
            self._lost = DeepLost(f"{self.address}: {reason}")
            away = list(self._away.values())
            self._away.clear()
        for each in away:
            each.answer.set_exception(self._lost)
        # Lets threads go that wait for the peer; before the writer's thread ends the call.
        self._reader.cancel()
        self._outbox.put(None)


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
