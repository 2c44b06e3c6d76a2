"""The form of an exchange's messages: Arrow record batches, each with a header beside it.

A header is four bytes of CRC-32 (little-endian) over the batch's values and what follows, then
JSON.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

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

FLUSH_SCHEMA = pa.schema([("items", pa.large_binary()), ("hidden", pa.large_binary())])
"""One row. ``items`` is int64: of each sequence its id, start, rows, outputs, whether logits are
wanted, the numbers of its blocks, copied rows and drafts, and then these. ``hidden`` is [rows of
all, d] in the model's dtype. Few columns: each costs more than what is in it, in caches that a pass
of the model has just emptied."""

REPLY_SCHEMA = pa.schema([("choices", pa.large_binary()), ("logits", pa.large_binary())])
"""One row, a ``FlushResult``; none where there is no result. ``choices`` is float32 [2, outputs],
best and logprobs, then int32 [outputs], argmax."""

_NO_RESULT = pa.RecordBatch.from_pylist([], schema=REPLY_SCHEMA)

_COUNTS = 8
"""Numbers in front of those of a sequence's blocks, copied rows and drafts."""


def encode_flush(flush: Flush) -> tuple[pa.RecordBatch, bytes]:
    """A record batch and its header."""
    numbers: list[int] = []
    for item in flush.items:
        numbers += (item.seq_id, item.start, len(item.hidden), item.num_outputs, int(item.logits))
        numbers += (len(item.blocks), len(item.copied), len(item.drafts))
        numbers += item.blocks
        numbers += item.copied
        numbers += item.drafts
    states = [item.hidden for item in flush.items]
    hidden = _bytes_of(torch.cat(states)) if states else b""
    batch = _batch(FLUSH_SCHEMA, np.array(numbers, np.int64).data, hidden)
    values: dict[str, Any] = {"number": flush.number}
    if flush.ops:
        values["ops"] = [(op.target, op.source) for op in flush.ops]
    if flush.publish:
        values["publish"] = [_keyed(each) for each in flush.publish]
    if flush.load is not None:
        values["load"] = _keyed(flush.load)
    return batch, _header(batch, **values)


def decode_flush(batch: pa.RecordBatch, header: bytes, hello: Hello) -> Flush:
    """Read a flush.

    Raises:
        ProtocolError: if it was changed on the way, or contradicts itself or the greeting.
    """
    fields = _read_header(batch, header)
    packed, states = (_buffer(batch, name) for name in FLUSH_SCHEMA.names)
    hidden = _tensor_of(states, getattr(torch, hello.dtype), hello.hidden_size)
    flush = Flush(
        fields["number"],
        [BlockOp(target, source) for target, source in fields.get("ops", ())],
        _items(np.frombuffer(packed, np.int64).tolist(), hidden),
        [_keyed_of(value) for value in fields.get("publish", ())],
        _keyed_of(fields["load"]) if "load" in fields else None,
    )
    _check(flush, hello)
    return flush


def _items(numbers: list[int], hidden: torch.Tensor) -> list[FlushItem]:
    items: list[FlushItem] = []
    at = row = 0
    while at < len(numbers):
        if at + _COUNTS > len(numbers) or min(numbers[at + 5 : at + 8]) < 0:
            raise ProtocolError("a flush ends within a sequence.")
        seq_id, start, rows, outputs, logits, *counts = numbers[at : at + _COUNTS]
        lists, at = [], at + _COUNTS
        for count in counts:
            lists.append(numbers[at : at + count])
            at += count
        states = hidden[row : row + rows] if rows >= 0 else hidden[:0]
        if at > len(numbers) or len(states) != rows:
            raise ProtocolError(f"sequence {seq_id}: {rows} rows of states are not all there.")
        row += rows
        blocks, copied, drafts = lists
        items.append(
            FlushItem(seq_id, blocks, start, states, outputs, copied, bool(logits), drafts)
        )
    if row != len(hidden):
        raise ProtocolError(f"{len(hidden)} rows of states came for {row}.")
    return items


def encode_lease(lease: Lease) -> tuple[pa.RecordBatch, bytes]:
    """The server's first message."""
    batch = _no_result()
    return batch, _header(batch, lease=lease.num_blocks, costs=list(lease.costs))


def decode_lease(batch: pa.RecordBatch, header: bytes) -> Lease:
    """Read the server's first message.

    Raises:
        ProtocolError: if it is something else.
    """
    fields = _read_header(batch, header)
    if "lease" not in fields:
        raise ProtocolError("the peer's first message is no lease.")
    return Lease(int(fields["lease"]), [(int(r), float(s)) for r, s in fields["costs"]])


def encode_beat() -> tuple[pa.RecordBatch, bytes]:
    """A sign of life."""
    batch = _no_result()
    return batch, _header(batch, beat=True)


def encode_goodbye() -> tuple[pa.RecordBatch, bytes]:
    """The server's last message: it closes, and clients had better go elsewhere."""
    batch = _no_result()
    return batch, _header(batch, goodbye=True)


def encode_reply(reply: Reply) -> tuple[pa.RecordBatch, bytes]:
    """A record batch and its header."""
    result = reply.result
    batch = _no_result()
    if result is not None:
        scores = np.array([result.best, result.logprobs], np.float32).tobytes()
        choices = scores + np.array(result.argmax, np.int32).tobytes()
        batch = _batch(REPLY_SCHEMA, choices, _bytes_of(result.logits))
    values: dict[str, Any] = {
        "number": reply.number,
        "loaded": reply.loaded,
        "pass_s": reply.pass_s,
        "queue_s": reply.queue_s,
    }
    if reply.error:
        values["error"] = reply.error
    return batch, _header(batch, **values)


def decode_reply(batch: pa.RecordBatch, header: bytes, hello: Hello) -> Reply | None:
    """Read what a server says; None for a sign of life.

    Raises:
        ProtocolError: if it was changed on the way, or is a goodbye.
    """
    fields = _read_header(batch, header)
    if "beat" in fields:
        return None
    if "goodbye" in fields:
        raise ProtocolError("the deep replica closes.")
    result = None
    if batch.num_rows:
        choices, logits = (_buffer(batch, name) for name in REPLY_SCHEMA.names)
        outputs = len(choices) // 12
        best, logprobs = np.frombuffer(choices, np.float32, 2 * outputs).reshape(2, -1).tolist()
        argmax = np.frombuffer(choices, np.int32, offset=8 * outputs).tolist()
        dtype = getattr(torch, hello.dtype)
        result = FlushResult(best, argmax, logprobs, _tensor_of(logits, dtype, hello.vocab_size))
    return Reply(
        fields["number"],
        result,
        fields.get("error", ""),
        fields["loaded"],
        fields["pass_s"],
        fields["queue_s"],
    )


def _no_result() -> pa.RecordBatch:
    return _NO_RESULT


def _batch(schema: pa.Schema, *values: bytes | memoryview) -> pa.RecordBatch:
    """One row of bytes."""
    columns = [pa.array([value], pa.large_binary()) for value in values]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _buffer(batch: pa.RecordBatch, name: str) -> pa.Buffer:
    """The one value of a column."""
    if batch.num_rows != 1:
        raise ProtocolError(f"a message has {batch.num_rows} rows in place of one.")
    return batch.column(name)[0].as_buffer()


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
    named += [block for each in keyed for block in each.blocks]
    named += [block for item in flush.items for block in item.blocks]
    outside = next((block for block in named if not 1 <= block <= hello.num_blocks), None)
    if outside is not None:
        raise ProtocolError(f"block {outside} lies outside the lease of {hello.num_blocks}.")
    for item in flush.items:
        rows = len(item.hidden)
        if item.start < 0 or item.start + rows > len(item.blocks) * hello.block_size:
            raise ProtocolError(
                f"sequence {item.seq_id}: rows {item.start} to {item.start + rows} do not fit "
                f"into {len(item.blocks)} blocks of {hello.block_size}."
            )
        copied = list(item.copied)
        if copied != sorted({row for row in copied if 0 <= row < rows}):
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
        if any(not -1 <= token < hello.vocab_size for token in item.drafts):
            raise ProtocolError(f"sequence {item.seq_id}: a draft is no token of the vocabulary.")


def _header(batch: pa.RecordBatch, **values: Any) -> bytes:
    words = json.dumps({"version": VERSION, **values}).encode()
    return zlib.crc32(words, _checksum(batch)).to_bytes(4, "little") + words


def _read_header(batch: pa.RecordBatch, header: bytes | None) -> Mapping[str, Any]:
    checksum, words = (header or b"")[:4], (header or b"")[4:]
    if zlib.crc32(words, _checksum(batch)).to_bytes(4, "little") != checksum:
        raise ProtocolError("a message was changed on its way: the checksum differs.")
    try:
        values: dict[str, Any] = json.loads(words)
        version = values["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ProtocolError(f"a message without a header that can be read: {error}") from error
    if version != VERSION:
        raise ProtocolError(f"a message of version {version}, this end speaks {VERSION}.")
    return values


def _checksum(batch: pa.RecordBatch) -> int:
    """CRC-32 of the values, however the batch lies in memory on either end."""
    checksum = 0
    if batch.num_rows:
        for name in batch.schema.names:
            checksum = zlib.crc32(_buffer(batch, name), checksum)
    return checksum


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().cpu().view(torch.uint8).numpy().reshape(-1).data


def _tensor_of(buffer: pa.Buffer, dtype: torch.dtype, width: int) -> torch.Tensor:
    """[rows, width]; a copy, since arrays that arrive are read-only."""
    size = width * dtype.itemsize
    if len(buffer) % size:
        raise ProtocolError(f"{len(buffer)} bytes are no rows of {width} {dtype} values.")
    rows = torch.empty(len(buffer) // size, width, dtype=dtype)
    rows.view(torch.uint8).numpy().reshape(-1)[:] = np.frombuffer(buffer, np.uint8)
    return rows
