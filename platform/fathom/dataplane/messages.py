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

FLUSH_SCHEMA = pa.schema(
    [
        ("seq", pa.int64()),
        ("blocks", pa.list_(pa.int32())),
        ("start", pa.int32()),
        ("outputs", pa.int32()),
        ("copied", pa.list_(pa.int32())),
        ("logits", pa.uint8()),
        ("drafts", pa.list_(pa.int32())),
        ("hidden", pa.large_binary()),
    ]
)
"""One row a sequence; ``hidden`` is [rows, d] in the model's dtype, row by row."""

REPLY_SCHEMA = pa.schema(
    [
        ("best", pa.list_(pa.float32())),
        ("argmax", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("logits", pa.large_binary()),
    ]
)
"""One row, a ``FlushResult``; none where there is no result."""


def encode_flush(flush: Flush) -> tuple[pa.RecordBatch, bytes]:
    """A record batch and its header."""
    items = flush.items
    columns = [
        pa.array([item.seq_id for item in items], pa.int64()),
        pa.array([list(item.blocks) for item in items], pa.list_(pa.int32())),
        pa.array([item.start for item in items], pa.int32()),
        pa.array([item.num_outputs for item in items], pa.int32()),
        pa.array([list(item.copied) for item in items], pa.list_(pa.int32())),
        pa.array([int(item.logits) for item in items], pa.uint8()),
        pa.array([list(item.drafts) for item in items], pa.list_(pa.int32())),
        pa.array([_bytes_of(item.hidden) for item in items], pa.large_binary()),
    ]
    batch = pa.RecordBatch.from_arrays(columns, schema=FLUSH_SCHEMA)
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
    dtype = getattr(torch, hello.dtype)
    columns = {name: batch.column(name) for name in FLUSH_SCHEMA.names}
    items = []
    for row in range(batch.num_rows):
        hidden = _tensor_of(columns["hidden"][row].as_buffer(), dtype, hello.hidden_size)
        items.append(
            FlushItem(
                seq_id=columns["seq"][row].as_py(),
                blocks=columns["blocks"][row].as_py(),
                start=columns["start"][row].as_py(),
                hidden=hidden,
                num_outputs=columns["outputs"][row].as_py(),
                copied=columns["copied"][row].as_py(),
                logits=bool(columns["logits"][row].as_py()),
                drafts=columns["drafts"][row].as_py(),
            )
        )
    flush = Flush(
        fields["number"],
        [BlockOp(target, source) for target, source in fields.get("ops", ())],
        items,
        [_keyed_of(value) for value in fields.get("publish", ())],
        _keyed_of(fields["load"]) if "load" in fields else None,
    )
    _check(flush, hello)
    return flush


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
        columns = [
            pa.array([list(result.best)], pa.list_(pa.float32())),
            pa.array([list(result.argmax)], pa.list_(pa.int32())),
            pa.array([list(result.logprobs)], pa.list_(pa.float32())),
            pa.array([_bytes_of(result.logits)], pa.large_binary()),
        ]
        batch = pa.RecordBatch.from_arrays(columns, schema=REPLY_SCHEMA)
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
        columns = {name: batch.column(name)[0] for name in REPLY_SCHEMA.names}
        buffer, dtype = columns["logits"].as_buffer(), getattr(torch, hello.dtype)
        result = FlushResult(
            columns["best"].as_py(),
            columns["argmax"].as_py(),
            columns["logprobs"].as_py(),
            _tensor_of(buffer, dtype, hello.vocab_size),
        )
    return Reply(
        fields["number"],
        result,
        fields.get("error", ""),
        fields["loaded"],
        fields["pass_s"],
        fields["queue_s"],
    )


def _no_result() -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([], schema=REPLY_SCHEMA)


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
    for column in batch.columns:
        kind = column.type
        if pa.types.is_large_binary(kind):
            for value in column:
                checksum = zlib.crc32(value.as_buffer(), checksum)
        else:
            flat = column.flatten() if pa.types.is_list(kind) else column
            checksum = zlib.crc32(flat.to_numpy(False).tobytes(), checksum)
            if pa.types.is_list(kind):
                lengths = column.value_lengths().to_numpy(False)
                checksum = zlib.crc32(lengths.tobytes(), checksum)
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
