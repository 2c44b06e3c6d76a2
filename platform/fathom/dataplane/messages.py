"""The form of an exchange's messages: Arrow record batches, each with a header beside it.

A batch is one column of bytes: what is in a message is laid out by hand, and what is rare is JSON
in the header. A flush meets caches that a pass of the model has just emptied, where each call into
a library costs more than what it does.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from fathom.dataplane.protocol import (
    VERSION,
    BlockOp,
    Flush,
    Hello,
    KeyedBlocks,
    Lease,
    ProtocolError,
    Reply,
)
from fathom.engine.deep import FlushItem, FlushResult
from fathom.kvstore.keys import KEY_BYTES

SCHEMA = pa.schema([pa.field("bytes", pa.uint8(), nullable=False)])
"""Of both directions.

A flush is int64 numbers: of each sequence its id, start, rows, outputs, whether logits are wanted,
how many numbers of its blocks, copied rows and drafts follow, and those. Then come the states of
all rows, [rows, d] in the model's dtype. A reply is a ``FlushResult``: float32 [2, outputs], best
and logprobs, int32 [outputs], argmax, then [rows, vocabulary] logits in the model's dtype.
"""

_HEADER = struct.Struct("<HHQIIdd")
"""Version, kind, number of the flush, size of the part before the tensor in bytes, blocks that were
loaded, seconds of the pass, seconds of waiting for it. CRC-32 goes before it, JSON behind."""

_FLUSH, _LEASE, _BEAT, _GOODBYE, _RESULT, _NO_RESULT = range(6)

_COUNTS = 8
"""Numbers in front of those of a sequence's blocks, copied rows and drafts."""

Message = tuple[pa.RecordBatch, bytes]
"""A batch and its header."""


class _Header(NamedTuple):
    kind: int
    number: int
    size: int
    loaded: int
    pass_s: float
    queue_s: float
    rest: bytes

    @property
    def fields(self) -> Mapping[str, Any]:
        """What is rare."""
        return json.loads(self.rest) if self.rest else {}


def encode_flush(flush: Flush) -> Message:
    """A record batch and its header."""
    numbers: list[int] = []
    for item in flush.items:
        blocks, copied, drafts = item.blocks, item.copied, item.drafts
        numbers += (
            item.seq_id, item.start, len(item.hidden), item.num_outputs, item.logits,
            len(blocks), len(copied), len(drafts), *blocks, *copied, *drafts,
        )  # fmt: skip
    rest: dict[str, Any] = {}
    if flush.ops:
        rest["ops"] = [(op.target, op.source) for op in flush.ops]
    if flush.publish:
        rest["publish"] = [_keyed(each) for each in flush.publish]
    if flush.load is not None:
        rest["load"] = _keyed(flush.load)
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    states = [item.hidden for item in flush.items]
    hidden = _bytes_of(torch.cat(states)) if states else b""
    return _message(_FLUSH, packed, hidden, number=flush.number, rest=rest)


def decode_flush(batch: pa.RecordBatch, header: bytes, hello: Hello) -> Flush:
    """Read a flush.

    Raises:
        ProtocolError: if it was changed on the way, or contradicts itself or the greeting.
    """
    body, head = _read(batch, header)
    if head.kind != _FLUSH or head.size % 8:
        raise ProtocolError("the peer's message is no flush.")
    fields = head.fields
    numbers = struct.unpack_from(f"<{head.size // 8}q", body)
    hidden = _tensor_of(body[head.size :], getattr(torch, hello.dtype), hello.hidden_size)
    flush = Flush(
        head.number,
        [BlockOp(target, source) for target, source in fields.get("ops", ())],
        _items(numbers, hidden),
        [_keyed_of(value) for value in fields.get("publish", ())],
        _keyed_of(fields["load"]) if "load" in fields else None,
    )
    _check(flush, hello)
    return flush


def _items(numbers: Sequence[int], hidden: torch.Tensor) -> list[FlushItem]:
    items: list[FlushItem] = []
    at = row = 0
    while at < len(numbers):
        if at + _COUNTS > len(numbers) or min(numbers[at + 5 : at + 8]) < 0:
            raise ProtocolError("a flush ends within a sequence.")
        seq_id, start, rows, outputs, logits, blocks, copied, drafts = numbers[at : at + _COUNTS]
        first = at + _COUNTS
        second = first + blocks
        third = second + copied
        at = third + drafts
        states = hidden[row : row + rows] if rows >= 0 else hidden[:0]
        if at > len(numbers) or len(states) != rows:
            raise ProtocolError(f"sequence {seq_id}: {rows} rows of states are not all there.")
        row += rows
        items.append(
            FlushItem(
                seq_id,
                numbers[first:second],
                start,
                states,
                outputs,
                numbers[second:third],
                bool(logits),
                numbers[third:at],
            )
        )
    if row != len(hidden):
        raise ProtocolError(f"{len(hidden)} rows of states came for {row}.")
    return items


def encode_lease(lease: Lease) -> Message:
    """The server's first message."""
    return _message(_LEASE, rest={"lease": lease.num_blocks, "costs": list(lease.costs)})


def decode_lease(batch: pa.RecordBatch, header: bytes) -> Lease:
    """Read the server's first message.

    Raises:
        ProtocolError: if it is something else.
    """
    _, head = _read(batch, header)
    if head.kind != _LEASE:
        raise ProtocolError("the peer's first message is no lease.")
    fields = head.fields
    return Lease(int(fields["lease"]), [(int(r), float(s)) for r, s in fields["costs"]])


def encode_beat() -> Message:
    """A sign of life."""
    return _message(_BEAT)


def encode_goodbye() -> Message:
    """The server's last message: it closes, and clients had better go elsewhere."""
    return _message(_GOODBYE)


def encode_reply(reply: Reply) -> Message:
    """A record batch and its header."""
    result = reply.result
    choices, logits = b"", memoryview(b"")
    if result is not None:
        count = len(result.best)
        choices = struct.pack(
            f"<{2 * count}f{count}i", *result.best, *result.logprobs, *result.argmax
        )
        if len(result.logits):
            logits = _bytes_of(result.logits)
    return _message(
        _NO_RESULT if result is None else _RESULT,
        choices,
        logits,
        number=reply.number,
        loaded=reply.loaded,
        pass_s=reply.pass_s,
        queue_s=reply.queue_s,
        rest={"error": reply.error} if reply.error else None,
    )


def decode_reply(batch: pa.RecordBatch, header: bytes, hello: Hello) -> Reply | None:
    """Read what a server says; None for a sign of life.

    Raises:
        ProtocolError: if it was changed on the way, or is a goodbye.
    """
    body, head = _read(batch, header)
    if head.kind == _BEAT:
        return None
    if head.kind == _GOODBYE:
        raise ProtocolError("the deep replica closes.")
    if head.kind not in (_RESULT, _NO_RESULT) or head.size % 12:
        raise ProtocolError("the peer's message is no reply.")
    result = None
    if head.kind == _RESULT:
        count = head.size // 12
        values = struct.unpack_from(f"<{2 * count}f{count}i", body)
        dtype = getattr(torch, hello.dtype)
        logits = _tensor_of(body[head.size :], dtype, hello.vocab_size)
        result = FlushResult(values[:count], values[2 * count :], values[count : 2 * count], logits)
    error = str(head.fields.get("error", ""))
    return Reply(head.number, result, error, head.loaded, head.pass_s, head.queue_s)


def _keyed(value: KeyedBlocks) -> tuple[list[int], str]:
    return list(value.blocks), b"".join(value.keys).hex()


def _keyed_of(value: Sequence[Any]) -> KeyedBlocks:
    blocks, joined = value[0], bytes.fromhex(value[1])
    if len(joined) % KEY_BYTES:
        raise ProtocolError(f"{len(joined)} bytes are no keys of {KEY_BYTES}.")
    keys = [joined[i : i + KEY_BYTES] for i in range(0, len(joined), KEY_BYTES)]
    return KeyedBlocks(blocks, keys)


def _check(flush: Flush, hello: Hello) -> None:
    keyed = [*flush.publish, *([] if flush.load is None else [flush.load])]
    for each in keyed:
        if len(each.blocks) > len(each.keys):
            raise ProtocolError(f"{len(each.blocks)} blocks have {len(each.keys)} keys.")
    named = [block for op in flush.ops for block in (op.target, op.source) if block is not None]
    lists = [named, *(each.blocks for each in keyed), *(item.blocks for item in flush.items)]
    for blocks in lists:
        if blocks and not (min(blocks) >= 1 and max(blocks) <= hello.num_blocks):
            outside = next(block for block in blocks if not 1 <= block <= hello.num_blocks)
            raise ProtocolError(f"block {outside} lies outside the lease of {hello.num_blocks}.")
    for item in flush.items:
        rows = len(item.hidden)
        if item.start < 0 or item.start + rows > len(item.blocks) * hello.block_size:
            raise ProtocolError(
                f"sequence {item.seq_id}: rows {item.start} to {item.start + rows} do not fit "
                f"into {len(item.blocks)} blocks of {hello.block_size}."
            )
        copied = list(item.copied)
        if copied and copied != sorted({row for row in copied if 0 <= row < rows}):
            raise ProtocolError(
                f"sequence {item.seq_id}: copied rows {copied} are not some of {rows} rows in "
                "ascending order."
            )
        if not 0 <= item.num_outputs <= rows - len(copied):
            raise ProtocolError(
                f"sequence {item.seq_id}: {len(copied)} copied rows and {item.num_outputs} "
                f"outputs do not fit into {rows} rows."
            )
        if len(item.drafts) not in (0, item.num_outputs):
            raise ProtocolError(
                f"sequence {item.seq_id}: {len(item.drafts)} drafts for {item.num_outputs} outputs."
            )
        if item.drafts and not -1 <= min(item.drafts) <= max(item.drafts) < hello.vocab_size:
            raise ProtocolError(f"sequence {item.seq_id}: a draft is no token of the vocabulary.")


def _message(
    kind: int,
    first: bytes = b"",
    second: bytes | memoryview = b"",
    *,
    number: int = 0,
    loaded: int = 0,
    pass_s: float = 0.0,
    queue_s: float = 0.0,
    rest: Mapping[str, Any] | None = None,
) -> Message:
    body = b"".join((first, second))
    column = pa.Array.from_buffers(pa.uint8(), len(body), [None, pa.py_buffer(body)])
    words = _HEADER.pack(VERSION, kind, number, len(first), loaded, pass_s, queue_s)
    if rest:
        words += json.dumps(rest).encode()
    checksum = zlib.crc32(words, zlib.crc32(body))
    batch = pa.RecordBatch.from_arrays([column], schema=SCHEMA)
    return batch, checksum.to_bytes(4, "little") + words


def _read(batch: pa.RecordBatch, header: bytes | None) -> tuple[memoryview, _Header]:
    """A message's bytes, and what its header says.

    Raises:
        ProtocolError: if it was changed on the way, or this end cannot read it.
    """
    if batch.schema.names != SCHEMA.names or batch.column(0).type != pa.uint8():
        raise ProtocolError(f"a message with the columns {batch.schema.names}, not one of bytes.")
    column = batch.column(0)
    values = column.buffers()[1]
    body = memoryview(b"" if values is None else values)[column.offset :][: len(column)]
    checksum, words = (header or b"")[:4], (header or b"")[4:]
    # CRC-32 of the values, however they lie in memory on either end.
    if zlib.crc32(words, zlib.crc32(body)).to_bytes(4, "little") != checksum:
        raise ProtocolError("a message was changed on its way: the checksum differs.")
    if len(words) < _HEADER.size:
        raise ProtocolError(f"a message whose header has {len(words)} bytes.")
    version, kind, number, size, loaded, pass_s, queue_s = _HEADER.unpack_from(words)
    if version != VERSION:
        raise ProtocolError(f"a message of version {version}, this end speaks {VERSION}.")
    head = _Header(kind, number, size, loaded, pass_s, queue_s, words[_HEADER.size :])
    if head.size > len(body):
        raise ProtocolError(f"a message of {len(body)} bytes ends before {head.size}.")
    return body, head


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().cpu().view(torch.uint8).numpy().reshape(-1).data


def _tensor_of(data: memoryview, dtype: torch.dtype, width: int) -> torch.Tensor:
    """[rows, width]; a copy, since arrays that arrive are read-only."""
    size = width * dtype.itemsize
    if len(data) % size:
        raise ProtocolError(f"{len(data)} bytes are no rows of {width} {dtype} values.")
    rows = torch.empty(len(data) // size, width, dtype=dtype)
    if len(data):
        rows.view(torch.uint8).numpy().reshape(-1)[:] = np.frombuffer(data, np.uint8)
    return rows
