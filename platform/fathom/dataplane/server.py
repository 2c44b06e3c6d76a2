"""The deep replica's end: leases blocks of its pool, and answers flushes."""

from __future__ import annotations

import dataclasses
import hmac
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import pyarrow as pa
import pyarrow.flight as flight
import torch

from fathom.dataplane import protocol
from fathom.dataplane.protocol import Hello, ProtocolError, Tls
from fathom.dataplane.worker import DeepWorker

MAX_IN_FLIGHT = 64
"""Flushes of one exchange that may wait for their answer; more ends the exchange."""


class DeepServer:
    """Serves a deep stage on a port.

    Args:
        worker: runs the flushes. hello: what clients must agree with; ``num_blocks`` is what the
            pool has for all of them together, the null block left out.
        token: what clients must show.
        host, port: to listen on; 0 takes a free port.
        tls: certificate and key; None leaves the connection open to who can listen to it.

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
    ) -> None:
        scheme = "grpc" if tls is None else "grpc+tls"
        self._leases = _Leases(hello.num_blocks)
        self._server = _FlightServer(
            f"{scheme}://{host}:{port}",
            worker,
            hello,
            self._leases,
            middleware={"token": _TokenCheck(token)},
            tls_certificates=None if tls is None else [(tls.certificate, tls.key)],
        )
        self.address = f"{scheme}://{host}:{self._server.port}"

    @property
    def free_blocks(self) -> int:
        """Blocks that no client has leased."""
        return self._leases.free

    def close(self) -> None:
        """Stop listening; exchanges under way break."""
        self._server.shutdown()


class _FlightServer(flight.FlightServerBase):
    def __init__(
        self, location: str, worker: DeepWorker, hello: Hello, leases: _Leases, **options: Any
    ) -> None:
        super().__init__(location, **options)
        self._worker = worker
        self._hello = hello
        self._leases = leases

    def do_exchange(
        self,
        context: flight.ServerCallContext,
        descriptor: flight.FlightDescriptor,
        reader: flight.MetadataRecordBatchReader,
        writer: flight.MetadataRecordBatchWriter,
    ) -> None:
        """One client, from its greeting until it goes."""
        try:
            hello = Hello.decode(descriptor.command)
            self._hello.check(hello)
            first = self._leases.take(hello.num_blocks)
        except ProtocolError as error:
            raise flight.FlightServerError(str(error)) from error
        exchange = _Exchange(self._worker, hello, first)
        try:
            writer.begin(protocol.ANSWER_SCHEMA)
            _write(writer, protocol.encode_lease(hello.num_blocks))
            exchange.run(reader, writer)
        except ProtocolError as error:
            raise flight.FlightServerError(str(error)) from error
        finally:
            exchange.wait()
            self._leases.give_back(first, hello.num_blocks)


class _Exchange:
    """Flushes come in on the caller's thread, answers go out on one of their own."""

    def __init__(self, worker: DeepWorker, hello: Hello, first: int) -> None:
        self._worker = worker
        self._hello = hello
        self._first = first
        self._away: deque[tuple[int, Future[torch.Tensor]] | None] = deque()
        self._changed = threading.Condition()

    def run(self, reader: Any, writer: Any) -> None:
        """Answer flushes until the client has no more.

        Raises:
            ProtocolError: for a message that cannot be taken.
        """
        # What a client before had written must not show: 0 * NaN is NaN.
        blocks = range(self._first, self._first + self._hello.num_blocks)
        self._worker.submit([], [(block, None) for block in blocks]).result()
        answering = threading.Thread(target=self._answer, args=(writer,), daemon=True)
        answering.start()
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
            self._put(None)
            answering.join()

    def wait(self) -> None:
        """Wait until nothing of this client is under way: its blocks can go to another then."""
        for away in list(self._away):
            if away is not None:
                away[1].exception()

    def _take(self, batch: pa.RecordBatch, header: bytes | None) -> None:
        flush = protocol.decode_flush(batch, header or b"", self._hello)
        with self._changed:
            if len(self._away) >= MAX_IN_FLIGHT:
                raise ProtocolError(f"more than {MAX_IN_FLIGHT} flushes are under way.")
        items = [
            dataclasses.replace(item, blocks=[self._own(block) for block in item.blocks])
            for item in flush.items
        ]
        ops = [
            (self._own(op.target), None if op.source is None else self._own(op.source))
            for op in flush.ops
        ]
        self._put((flush.number, self._worker.submit(items, ops)))

    def _own(self, block: int) -> int:
        """The pool's block for a client's: its first one is 1."""
        return self._first + block - 1

    def _put(self, value: tuple[int, Future[torch.Tensor]] | None) -> None:
        with self._changed:
            self._away.append(value)
            self._changed.notify()

    def _answer(self, writer: Any) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._away)
                head = self._away[0]
            if head is None:
                return
            number, answer = head
            error = answer.exception()
            message = (
                protocol.encode_answer(number, answer.result())
                if error is None
                else protocol.encode_failure(number, f"{type(error).__name__}: {error}")
            )
            with self._changed:
                self._away.popleft()
            try:
                _write(writer, message)
            except (pa.ArrowException, OSError):
                return  # nobody listens any more


def _write(writer: Any, message: tuple[pa.RecordBatch, bytes]) -> None:
    batch, header = message
    writer.write_with_metadata(batch, header)


class _Leases:
    """Ranges of blocks [1, num_blocks] that clients have, first fit."""

    def __init__(self, num_blocks: int) -> None:
        self._lock = threading.Lock()
        self._free: list[tuple[int, int]] = [(1, num_blocks)]

    @property
    def free(self) -> int:
        """Blocks in no lease."""
        with self._lock:
            return sum(count for _, count in self._free)

    def take(self, count: int) -> int:
        """Lease ``count`` blocks side by side; returns the first.

        Raises:
            ProtocolError: if there are none.
        """
        with self._lock:
            for index, (first, size) in enumerate(self._free):
                if 0 < count <= size:
                    self._free[index] = (first + count, size - count)
                    return first
            largest = max((size for _, size in self._free), default=0)
        raise ProtocolError(
            f"num_blocks: {count} deep KV blocks are wanted, {largest} can be had: lower the "
            "shallow replica's kv_cache_bytes, or add deep replicas."
        )

    def give_back(self, first: int, count: int) -> None:
        """End a lease."""
        with self._lock:
            self._free.append((first, count))
            merged: list[tuple[int, int]] = []
            for start, size in sorted(self._free):
                if merged and sum(merged[-1]) == start:
                    merged[-1] = (merged[-1][0], merged[-1][1] + size)
                elif size:
                    merged.append((start, size))
            self._free = merged


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
