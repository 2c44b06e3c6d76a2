"""What is sent is what arrives; what was changed on the way is refused."""

from __future__ import annotations

import contextlib
import json
import zlib

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.dataplane import messages, protocol
from fathom.dataplane.protocol import (
    BlockOp,
    Flush,
    Hello,
    KeyedBlocks,
    Lease,
    ProtocolError,
    Reply,
)
from fathom.engine.deep import FlushItem, FlushResult

BLOCK, WIDTH, VOCAB, BLOCKS = 4, 3, 5, 20
HELLO = Hello(protocol.VERSION, "w", "a", 2, 6, "bfloat16", BLOCK, WIDTH, VOCAB, BLOCKS)


@st.composite
def items(draw: st.DrawFn) -> FlushItem:
    start, rows = draw(st.integers(0, 12)), draw(st.integers(1, 9))
    copied = sorted(draw(st.sets(st.integers(0, rows - 1))))
    count = -(-(start + rows) // BLOCK)
    outputs = draw(st.integers(0, rows - len(copied)))
    drafts = draw(st.lists(st.integers(-1, VOCAB - 1), min_size=outputs, max_size=outputs))
    return FlushItem(
        seq_id=draw(st.integers(0, 2**40)),
        blocks=draw(st.lists(st.integers(1, BLOCKS), min_size=count, max_size=count)),
        start=start,
        hidden=torch.randn(rows, WIDTH).to(torch.bfloat16),
        num_outputs=outputs,
        copied=copied,
        logits=draw(st.booleans()),
        drafts=drafts,
    )


@st.composite
def keyed(draw: st.DrawFn) -> KeyedBlocks:
    keys = draw(st.lists(st.binary(min_size=16, max_size=16), max_size=5))
    return KeyedBlocks(draw(st.lists(st.integers(1, BLOCKS), max_size=len(keys))), keys)


ops = st.builds(BlockOp, st.integers(1, BLOCKS), st.none() | st.integers(1, BLOCKS))
flushes = st.builds(
    Flush,
    st.integers(0, 2**30),
    st.lists(ops, max_size=4),
    st.lists(items(), max_size=4),
    st.lists(keyed(), max_size=2),
    st.none() | keyed(),
)


def wire(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Through Arrow's IPC format, as an exchange sends it."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return pa.ipc.open_stream(sink.getvalue()).read_next_batch()


@settings(max_examples=60, deadline=None)
@given(flush=flushes)
def test_a_flush_arrives_as_it_was_sent(flush: Flush) -> None:
    batch, header = messages.encode_flush(flush)
    found = messages.decode_flush(wire(batch), header, HELLO)
    assert (found.number, list(found.ops)) == (flush.number, list(flush.ops))
    assert (found.publish, found.load) == (flush.publish, flush.load)
    assert len(found.items) == len(flush.items)
    for own, other in zip(flush.items, found.items, strict=True):
        assert torch.equal(own.hidden, other.hidden)
        for name in ("seq_id", "start", "num_outputs", "logits"):
            assert getattr(own, name) == getattr(other, name)
        for name in ("blocks", "copied", "drafts"):
            assert list(getattr(own, name)) == list(getattr(other, name))


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_a_reply_arrives_as_it_was_sent(rows: int) -> None:
    logits = torch.randn(rows, VOCAB).to(torch.bfloat16)
    result = FlushResult([1.5, -2.0, 0.25], [3, 0, 4], [-0.5, -1.0, -2.0], logits)
    sent = Reply(3, result, loaded=2, pass_s=0.25, queue_s=0.5)
    batch, header = messages.encode_reply(sent)
    found = messages.decode_reply(wire(batch), header, HELLO)
    assert (found.number, found.error, found.loaded) == (3, "", 2)
    assert (found.pass_s, found.queue_s) == (0.25, 0.5)
    assert torch.equal(found.result.logits, logits)
    for name in ("best", "argmax", "logprobs"):
        assert list(getattr(found.result, name)) == getattr(result, name)


def test_a_failure_keeps_its_words() -> None:
    batch, header = messages.encode_reply(Reply(4, None, "out of memory"))
    assert messages.decode_reply(wire(batch), header, HELLO) == Reply(4, None, "out of memory")


def test_a_lease_and_a_sign_of_life() -> None:
    lease = Lease(12, [(1, 0.5), (8, 0.75)])
    assert messages.decode_lease(*messages.encode_lease(lease)) == lease
    batch, header = messages.encode_beat()
    assert messages.decode_reply(wire(batch), header, HELLO) is None
    with pytest.raises(ProtocolError, match="no lease"):
        messages.decode_lease(batch, header)


def test_a_changed_header_is_noticed() -> None:
    batch, header = messages.encode_flush(Flush(0, [BlockOp(1, 2)], []))
    with pytest.raises(ProtocolError, match="checksum"):
        messages.decode_flush(batch, header.replace(b"[1, 2]", b"[1, 3]"), HELLO)


@settings(max_examples=40, deadline=None)
@given(flush=flushes.filter(lambda flush: flush.items), data=st.data())
def test_a_changed_byte_is_noticed(flush: Flush, data: st.DataObject) -> None:
    batch, header = messages.encode_flush(flush)
    value = bytearray(batch.column(0).to_pylist())
    value[data.draw(st.integers(0, len(value) - 1))] ^= 1
    changed = pa.RecordBatch.from_arrays([pa.array(list(value), pa.uint8())], batch.schema)
    with pytest.raises(ProtocolError, match="checksum"):
        messages.decode_flush(changed, header, HELLO)


@settings(max_examples=60, deadline=None)
@given(kind=st.integers(0, 9), first=st.binary(max_size=96), second=st.binary(max_size=16))
def test_no_message_does_more_than_be_refused(kind: int, first: bytes, second: bytes) -> None:
    """Whole by its checksum, but anything may be in it."""
    message = messages._message(kind, first, second)
    for decode in (messages.decode_flush, messages.decode_reply):
        with contextlib.suppress(ProtocolError):
            decode(*message, HELLO)


@pytest.mark.parametrize("names", [[], ["bytes"], ["bytes", "more"]])
def test_other_columns_are_refused(names: list[str]) -> None:
    _, header = messages.encode_beat()
    batch = pa.RecordBatch.from_arrays([pa.array(["x"]) for _ in names], names=names)
    with pytest.raises(ProtocolError, match="not one of bytes"):
        messages.decode_reply(batch, header, HELLO)


def test_a_message_of_another_version_is_refused() -> None:
    batch, header = messages.encode_beat()
    words = (protocol.VERSION + 1).to_bytes(2, "little") + header[6:]
    changed = zlib.crc32(words, zlib.crc32(b"")).to_bytes(4, "little") + words
    with pytest.raises(ProtocolError, match=f"version {protocol.VERSION + 1}, this end speaks"):
        messages.decode_reply(batch, changed, HELLO)
    with pytest.raises(ProtocolError, match="checksum"):
        messages.decode_reply(batch, b"", HELLO)


def item(**fields) -> FlushItem:
    values = {"seq_id": 7, "blocks": [1], "start": 0, "hidden": torch.zeros(2, WIDTH).bfloat16(),
              "num_outputs": 1, "copied": ()}  # fmt: skip
    return FlushItem(**{**values, **fields})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Flush(0, [], [item(blocks=[BLOCKS + 1])]), "block 21 lies outside the lease of 20"),
        (Flush(0, [], [item(blocks=[0])]), "block 0 lies outside the lease"),
        (Flush(0, [BlockOp(1, 40)], []), "block 40 lies outside the lease"),
        (Flush(0, [], [], [KeyedBlocks([40], [bytes(16)])]), "block 40 lies outside the lease"),
        (Flush(0, [], [], load=KeyedBlocks([1, 2], [bytes(16)])), "2 blocks have 1 keys"),
        (Flush(0, [], [item(drafts=[1, 2])]), "2 drafts for 1 outputs"),
        (Flush(0, [], [item(drafts=[VOCAB])]), "a draft is no token of the vocabulary"),
        (Flush(0, [], [item(start=3)]), "sequence 7: rows 3 to 5 do not fit into 1 blocks of 4"),
        (Flush(0, [], [item(num_outputs=3)]), "3 outputs do not fit into 2 rows"),
        (Flush(0, [], [item(copied=[0, 1])]), "2 copied rows and 1 outputs do not fit into 2 row"),
        (Flush(0, [], [item(copied=[2])]), r"copied rows \[2\] are not some of 2 rows"),
        (Flush(0, [], [item(copied=[0, 0])]), r"copied rows \[0, 0\] are not some of 2 rows"),
        (Flush(0, [], [item(hidden=torch.zeros(1, 1).bfloat16())]), "2 bytes are no rows of 3"),
    ],
)
def test_what_contradicts_the_lease_or_itself_is_refused(wrong: Flush, message: str) -> None:
    batch, header = messages.encode_flush(wrong)
    with pytest.raises(ProtocolError, match=message):
        messages.decode_flush(batch, header, HELLO)


def test_greetings_must_agree_in_all_but_the_blocks() -> None:
    fields = json.loads(HELLO.encode())
    assert Hello.decode(HELLO.encode()) == HELLO
    HELLO.check(Hello(**{**fields, "num_blocks": 3}))
    for name in fields.keys() - {"num_blocks", "version"}:
        value = fields[name]
        other = Hello(**{**fields, name: f"{value}x" if isinstance(value, str) else value + 1})
        with pytest.raises(ProtocolError, match=f"^{name} is .* deploy both from the same"):
            HELLO.check(other)


@pytest.mark.parametrize(
    "greeting", [b"", b"[]", b"hi", b'{"version": %d}' % protocol.VERSION, None]
)
def test_what_is_no_greeting_is_refused(greeting: bytes | None) -> None:
    with pytest.raises(ProtocolError, match="cannot be read"):
        Hello.decode(greeting)


def test_another_version_is_refused_by_name() -> None:
    later = json.dumps({"version": protocol.VERSION + 1, "new_field": 1}).encode()
    with pytest.raises(ProtocolError, match=f"version {protocol.VERSION + 1} of the .*: install"):
        Hello.decode(later)
