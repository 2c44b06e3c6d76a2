"""The messages of an exchange: who speaks, what a flush holds, what comes back.

An exchange is one ``DoExchange`` call of Arrow Flight. The client's descriptor holds a ``Hello``;
the server answers with a lease of blocks, or refuses. Then each record batch of the client is a
flush, one row a sequence, and each of the server is the answer to one, in the order of the
flushes. A header beside every batch holds its number, what else there is to do, and a checksum
(CRC-32) of the batch's values.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from fathom.engine.deep import FlushItem

VERSION = 1

FLUSH_SCHEMA = pa.schema(
    [
        ("seq", pa.int64()),
        ("blocks", pa.list_(pa.int32())),
        ("start", pa.int32()),
        ("outputs", pa.int32()),
        ("copied", pa.list_(pa.int32())),
        ("hidden", pa.large_binary()),
    ]
)
"""One row a sequence; ``hidden`` is [rows, d] in the model's dtype, row by row."""

ANSWER_SCHEMA = pa.schema([("logits", pa.large_binary())])
"""One row: [outputs of all sequences, vocabulary] in the model's dtype; none after a failure."""


class ProtocolError(ValueError):
    """A message that cannot be read, or a peer that must not be talked to."""


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM texts: a certificate with its key for a server, the authority's alone for a client."""

    certificate: bytes
    key: bytes = b""


@dataclass(frozen=True, slots=True)
class Hello:
    """What both ends must agree on, and how many blocks the client would like.

    Attributes:
        version: of the protocol. weights_digest, adapter: of the model, adapter empty unless it
            changes the full path. first_layer, last_layer: the deep stage's. dtype: of states, keys
            and logits. block_size: tokens a block. hidden_size, vocab_size: of the model.
        num_blocks: wanted by the client.
    """

    version: int
    weights_digest: str
    adapter: str
    first_layer: int
    last_layer: int
    dtype: str
    block_size: int
    hidden_size: int
    vocab_size: int
    num_blocks: int

    def encode(self) -> bytes:
        """For the descriptor."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, data: bytes | None) -> Hello:
        """Read a descriptor.

        Raises:
            ProtocolError: for something else, a later version among it.
        """
        try:
            value = json.loads(data or b"")
            version = value["version"]
            if version != VERSION:
                raise ProtocolError(
                    f"the peer speaks version {version} of the protocol, this end {VERSION}: "
                    "install the same fathom-serve on both."
                )
            return cls(**value)
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, ProtocolError):
                raise
            raise ProtocolError(f"the peer's greeting cannot be read: {error}") from error

    def check(self, other: Hello) -> None:
        """Check that a client's greeting fits this deep stage.

        Raises:
            ProtocolError: naming the first field that differs, with both values.
        """
        for field in fields(self):
            own, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name != "num_blocks" and own != theirs:
                raise ProtocolError(
                    f"{field.name} is {own!r} at the deep replica and {theirs!r} at the shallow "
                    "one: deploy both from the same settings."
                )


@dataclass(frozen=True, slots=True)
class BlockOp:
    """Something to do with blocks before a flush, in order: copy, or zero without a source."""

    target: int
    source: int | None = None


@dataclass(frozen=True, slots=True)
class Flush:
    """A flush as it arrives.

    Attributes:
        number: counts up from 0 in an exchange. ops: to be done before.
    """

    number: int
    ops: Sequence[BlockOp]
    items: Sequence[FlushItem]


def encode_flush(flush: Flush) -> tuple[pa.RecordBatch, bytes]:
    """A record batch and its header."""
    items = flush.items
    columns = [
        pa.array([item.seq_id for item in items], pa.int64()),
        pa.array([list(item.blocks) for item in items], pa.list_(pa.int32())),
        pa.array([item.start for item in items], pa.int32()),
        pa.array([item.num_outputs for item in items], pa.int32()),
        pa.array([list(item.copied) for item in items], pa.list_(pa.int32())),
        pa.array([_bytes_of(item.hidden) for item in items], pa.large_binary()),
    ]
    batch = pa.RecordBatch.from_arrays(columns, schema=FLUSH_SCHEMA)
    ops = [(op.target, op.source) for op in flush.ops]
    return batch, _header(batch, number=flush.number, ops=ops)


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
            )
        )
    ops = [BlockOp(target, source) for target, source in fields["ops"]]
    flush = Flush(fields["number"], ops, items)
    _check(flush, hello)
    return flush


def encode_answer(number: int, logits: torch.Tensor) -> tuple[pa.RecordBatch, bytes]:
    """A record batch and its header; ``logits`` as in ``FlushResult``."""
    batch = pa.RecordBatch.from_arrays(
        [pa.array([_bytes_of(logits)], pa.large_binary())], schema=ANSWER_SCHEMA
    )
    return batch, _header(batch, number=number)


def encode_failure(number: int, error: str) -> tuple[pa.RecordBatch, bytes]:
    """The answer to a flush that has failed; the exchange goes on."""
    batch = pa.RecordBatch.from_arrays([pa.array([], pa.large_binary())], schema=ANSWER_SCHEMA)
    return batch, _header(batch, number=number, error=error)


def encode_lease(num_blocks: int) -> tuple[pa.RecordBatch, bytes]:
    """The server's first message: blocks 1 to ``num_blocks`` are the client's to use."""
    batch = pa.RecordBatch.from_arrays([pa.array([], pa.large_binary())], schema=ANSWER_SCHEMA)
    return batch, _header(batch, lease=num_blocks)


def decode_lease(batch: pa.RecordBatch, header: bytes) -> int:
    """Blocks that the client may use.

    Raises:
        ProtocolError: if the message is something else.
    """
    fields = _read_header(batch, header)
    if "lease" not in fields:
        raise ProtocolError("the peer's first message is no lease.")
    return int(fields["lease"])


def decode_answer(
    batch: pa.RecordBatch, header: bytes, hello: Hello
) -> tuple[int, torch.Tensor | None, str]:
    """Number of the flush, its logits or None, and what went wrong.

    Raises:
        ProtocolError: if it was changed on the way.
    """
    fields = _read_header(batch, header)
    if "error" in fields:
        return fields["number"], None, fields["error"]
    buffer = batch.column("logits")[0].as_buffer()
    dtype = getattr(torch, hello.dtype)
    return fields["number"], _tensor_of(buffer, dtype, hello.vocab_size), ""


def _check(flush: Flush, hello: Hello) -> None:
    for op in flush.ops:
        for block in (op.target, op.source):
            if block is not None and not 1 <= block <= hello.num_blocks:
                raise ProtocolError(f"block {block} lies outside the lease of {hello.num_blocks}.")
    for item in flush.items:
        rows = len(item.hidden)
        outside = [b for b in item.blocks if not 1 <= b <= hello.num_blocks]
        if outside:
            raise ProtocolError(f"block {outside[0]} lies outside the lease of {hello.num_blocks}.")
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


def _header(batch: pa.RecordBatch, **values: Any) -> bytes:
    return json.dumps({"version": VERSION, "crc": _checksum(batch), **values}).encode()


def _read_header(batch: pa.RecordBatch, header: bytes | None) -> Mapping[str, Any]:
    try:
        values: dict[str, Any] = json.loads(header or b"")
        version, checksum = values["version"], values["crc"]
    except (ValueError, KeyError, TypeError) as error:
        raise ProtocolError(f"a message without a header that can be read: {error}") from error
    if version != VERSION:
        raise ProtocolError(f"a message of version {version}, this end speaks {VERSION}.")
    if checksum != _checksum(batch):
        raise ProtocolError("a message was changed on its way: the checksum differs.")
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
