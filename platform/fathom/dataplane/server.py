"""The deep replica's end: leases blocks of its pool, and answers flushes."""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight

from fathom.dataplane import messages
from fathom.dataplane.leases import Leases
from fathom.dataplane.messages import Message
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
from fathom.dataplane.worker import DeepWorker, Work
from fathom.engine.shared import SharedBlocks

MAX_IN_FLIGHT = 256
"""Flushes of one exchange that may wait for their reply; more ends the exchange."""

BEAT_S = 1.0
"""Seconds without a reply after which a server gives a sign of life."""

_CLOSE_S = 5.0
_NO_STORE = "there is no KV store here"


class DeepServer:
    """Serves a deep stage on a port.

    Args:
        worker: runs the flushes. hello: what clients must agree with; ``num_blocks`` is what the
            pool has for all of them together, the null block left out.
        token: what clients must show.
        host, port: to listen on; 0 takes a free port.
        tls: certificate and key; None leaves the connection open to who can listen to it.
        costs: (rows, seconds) of a deep pass, told to clients.
        shared: the stage's blocks in the KV store, if there is one.

    Attributes:
        address: for clients, with the port that was taken.
    """

    def __init__(
        self,
        worker: DeepWorker,
        hello: Hello,
        *,
        token: str,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: Tls | None = None,
        costs: Sequence[tuple[int, float]] = ((1, 0.0),),
        shared: SharedBlocks | None = None,
    ) -> None:
        scheme = "grpc" if tls is None else "grpc+tls"
        self._leases = Leases(hello.num_blocks)
        self._exchanges: set[_Exchange] = set()
        self._server = _FlightServer(
            f"{scheme}://{host}:{port}",
            _Deep(worker, hello, self._leases, costs, shared, self._exchanges),
            middleware={"token": _TokenCheck(token)},
            tls_certificates=None if tls is None else [(tls.certificate, tls.key)],
        )
        self.address = f"{scheme}://{host}:{self._server.port}"

    @property
    def free_blocks(self) -> int:
        """Blocks that no client has leased."""
        return self._leases.free

    def close(self) -> None:
        """Stop listening, and tell clients to go elsewhere; what is under way is lost."""
        for exchange in list(self._exchanges):
            exchange.say_goodbye()
        # Flight waits for every call to end; a client that hangs must not keep us.
        shutdown = threading.Thread(target=self._server.shutdown, daemon=True)
        shutdown.start()
        shutdown.join(_CLOSE_S)


@dataclasses.dataclass(frozen=True, slots=True)
class _Deep:
    """What all exchanges of a server share."""

    worker: DeepWorker
    hello: Hello
    leases: Leases
    costs: Sequence[tuple[int, float]]
    shared: SharedBlocks | None
    exchanges: set[_Exchange]


class _FlightServer(flight.FlightServerBase):
    def __init__(self, location: str, deep: _Deep, **options: Any) -> None:
        super().__init__(location, **options)
        self._deep = deep

    def do_exchange(
        self,
        context: flight.ServerCallContext,
        descriptor: flight.FlightDescriptor,
        reader: flight.MetadataRecordBatchReader,
        writer: flight.MetadataRecordBatchWriter,
    ) -> None:
        """One client, from its greeting until it goes."""
        deep = self._deep
        try:
            hello = Hello.decode(descriptor.command)
            deep.hello.check(hello)
            first = deep.leases.take(hello.num_blocks)
        except ProtocolError as error:
            raise flight.FlightServerError(str(error)) from error
        exchange = _Exchange(deep, hello, first, writer)
        deep.exchanges.add(exchange)
        try:
            writer.begin(messages.SCHEMA)
            _write(writer, messages.encode_lease(Lease(hello.num_blocks, deep.costs)))
            exchange.run(reader)
        except ProtocolError as error:
            raise flight.FlightServerError(str(error)) from error
        finally:
            deep.exchanges.discard(exchange)
            exchange.wait()
            deep.leases.give_back(first, hello.num_blocks)


class _Exchange:
    """Flushes come in on the caller's thread; a thread replies to what is not answered at once."""

    def __init__(self, deep: _Deep, hello: Hello, first: int, writer: Any) -> None:
        self._deep = deep
        self._writer = writer
        self._writing = threading.Lock()
        self._ended = False
        self._hello = hello
        self._first = first
        self._away: set[Future[Any]] = set()
        self._lock = threading.Lock()
        self._outbox: queue.SimpleQueue[Callable[[], Message] | None] = queue.SimpleQueue()

    def run(self, reader: Any) -> None:
        """Answer flushes until the client has no more.

        Raises:
            ProtocolError: for a message that cannot be taken.
        """
        # What a client before had written must not show: 0 * NaN is NaN.
        blocks = range(1, self._hello.num_blocks + 1)
        scrub = Flush(0, [BlockOp(block) for block in blocks], [])
        self._deep.worker.submit([], lambda: self._prepare(scrub)).result()
        replying = threading.Thread(target=self._reply, daemon=True)
        replying.start()
        try:
            while True:
                try:
                    batch, header = reader.read_chunk()
                except StopIteration:
                    return
                except (pa.ArrowException, OSError):
                    return  # the client is gone
                self._take(batch, None if header is None else header.to_pybytes())
        finally:
            self._outbox.put(None)
            replying.join()

    def say_goodbye(self) -> None:
        """Tell the client that this end closes."""
        self._outbox.put(_goodbye)

    def wait(self) -> None:
        """Wait until nothing of this client is under way: its blocks can go to another then.

        Nothing is written afterwards: Flight frees the writer when the call returns. A flush counts
        as done before its reply is sent.
        """
        with self._writing:
            self._ended = True
        with self._lock:
            away = list(self._away)
        wait_for(away)

    def _take(self, batch: pa.RecordBatch, header: bytes | None) -> None:
        flush = messages.decode_flush(batch, header or b"", self._hello)
        with self._lock:
            if len(self._away) >= MAX_IN_FLIGHT:
                raise ProtocolError(f"more than {MAX_IN_FLIGHT} flushes are under way.")
        items = [
            dataclasses.replace(item, blocks=self._own_blocks(item.blocks)) for item in flush.items
        ]
        work = self._deep.worker.submit(items, lambda: self._prepare(flush))
        self._track(work)
        if flush.load is None:
            large = any(item.logits for item in items)
            work.add_done_callback(
                lambda done: self._put(lambda: _answered(flush.number, done), large=large)
            )
        else:
            load = flush.load
            work.add_done_callback(lambda _: self._load(flush.number, load))

    def _track(self, future: Future[Any]) -> None:
        with self._lock:
            self._away.add(future)
        future.add_done_callback(self._untrack)

    def _untrack(self, future: Future[Any]) -> None:
        with self._lock:
            self._away.discard(future)

    def _prepare(self, flush: Flush) -> None:
        """What a flush asks for before its rows, on the stage's thread."""
        pool, shared = self._deep.worker.stage.pool, self._deep.shared
        for op in flush.ops:
            if op.source is None:
                pool.zero_block(self._own(op.target))
            else:
                pool.copy_block(self._own(op.source), self._own(op.target))
        for each in flush.publish if shared is not None else ():
            assert shared is not None
            shared.publish(self._own_blocks(each.blocks), each.keys)

    def _load(self, number: int, load: KeyedBlocks) -> None:
        """Load blocks beside the passes: nobody else looks at them."""
        shared = self._deep.shared
        if shared is None:
            self._put(lambda: messages.encode_reply(Reply(number, None, _NO_STORE)))
            return
        loaded = shared.load(self._own_blocks(load.blocks), load.keys)
        self._track(loaded)
        loaded.add_done_callback(lambda done: self._put(lambda: _loaded(number, done)))

    def _own(self, block: int) -> int:
        """The pool's block for a client's: its first one is 1."""
        return self._first + block - 1

    def _own_blocks(self, blocks: Sequence[int]) -> list[int]:
        return [self._own(block) for block in blocks]

    def _put(self, made: Callable[[], Message], *, large: bool = False) -> None:
        """Reply at once, or leave it to the thread: waking that takes as long as a small reply.

        Called on the stage's thread, which no client may block: what is large, or has to wait
        for another reply, goes to the thread.
        """
        if large or not self._writing.acquire(blocking=False):
            self._outbox.put(made)
            return
        try:
            self._write(made())
        finally:
            self._writing.release()

    def _reply(self) -> None:
        while True:
            try:
                made = self._outbox.get(timeout=BEAT_S)
            except queue.Empty:
                made = messages.encode_beat
            if made is None:
                return
            with self._writing:
                self._write(made())

    def _write(self, message: Message) -> None:
        if self._ended:
            return
        with contextlib.suppress(pa.ArrowException, OSError):  # nobody listens any more
            _write(self._writer, message)


def _answered(number: int, done: Future[Work]) -> Message:
    error = done.exception()
    if error is not None:
        return messages.encode_reply(Reply(number, None, f"{type(error).__name__}: {error}"))
    work = done.result()
    reply = Reply(number, work.result, pass_s=work.pass_s, queue_s=work.queue_s)
    return messages.encode_reply(reply)


def _loaded(number: int, done: Future[int]) -> Message:
    error = None if done.cancelled() else done.exception()
    if done.cancelled() or error is not None:
        return messages.encode_reply(Reply(number, None, f"loading failed: {error}"))
    return messages.encode_reply(Reply(number, None, loaded=done.result()))


def _goodbye() -> Message:
    return messages.encode_goodbye()


def _write(writer: Any, message: Message) -> None:
    batch, header = message
    writer.write_with_metadata(batch, header)


class _TokenCheck(flight.ServerMiddlewareFactory):
    """Refuses calls without the token, before anything of them is read."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    def start_call(
        self, info: flight.CallInfo, headers: Mapping[str, Sequence[str]]
    ) -> flight.ServerMiddleware | None:
        """Called by Flight as a call begins."""
        shown = "".join(headers.get("authorization", ())).encode()
        if not hmac.compare_digest(shown, self._expected):
            raise flight.FlightUnauthenticatedError(
                "the data plane's token is missing or wrong: both replicas must belong to one "
                "deployment."
            )
        return None
