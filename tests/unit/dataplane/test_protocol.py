"""What is sent is what arrives; what was changed on the way is refused."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.dataplane import protocol
from fathom.dataplane.protocol import BlockOp, Flush, Hello, ProtocolError
from fathom.engine.deep import FlushItem

BLOCK, WIDTH, VOCAB, BLOCKS = 4, 3, 5, 20
HELLO = Hello(protocol.VERSION, "w", "a", 2, 6, "bfloat16", BLOCK, WIDTH, VOCAB, BLOCKS)


@st.composite
def items(draw: st.DrawFn) -> FlushItem:
    start, rows = draw(st.integers(0, 12)), draw(st.integers(1, 9))
    copied = sorted(draw(st.sets(st.integers(0, rows - 1))))
    count = -(-(start + rows) // BLOCK)
    return FlushItem(
        seq_id=draw(st.integers(0, 2**40)),
        blocks=draw(st.lists(st.integers(1, BLOCKS), min_size=count, max_size=count)),
        start=start,
        hidden=torch.randn(rows, WIDTH).to(torch.bfloat16),
        num_outputs=draw(st.integers(0, rows - len(copied))),
        copied=copied,
    )


ops = st.builds(BlockOp, st.integers(1, BLOCKS), st.none() | st.integers(1, BLOCKS))
flushes = st.builds(
    Flush, st.integers(0, 2**30), st.lists(ops, max_size=4), st.lists(items(), max_size=4)
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
    batch, header = protocol.encode_flush(flush)
    found = protocol.decode_flush(wire(batch), header, HELLO)
    assert (found.number, list(found.ops)) == (flush.number, list(flush.ops))
    assert len(found.items) == len(flush.items)
    for own, other in zip(flush.items, found.items, strict=True):
        assert torch.equal(own.hidden, other.hidden)
        for name in ("seq_id", "start", "num_outputs", "copied"):
            assert getattr(own, name) == getattr(other, name)
        assert list(own.blocks) == list(other.blocks)


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_an_answer_arrives_as_it_was_sent(rows: int) -> None:
    logits = torch.randn(rows, VOCAB).to(torch.bfloat16)
    batch, header = protocol.encode_answer(3, logits)
    number, found, error = protocol.decode_answer(wire(batch), header, HELLO)
    assert (number, error) == (3, "")
    assert torch.equal(found, logits)


def test_a_failure_keeps_its_words() -> None:
    batch, header = protocol.encode_failure(4, "out of memory")
    assert protocol.decode_answer(wire(batch), header, HELLO) == (4, None, "out of memory")


@settings(max_examples=40, deadline=None)
@given(flush=flushes.filter(lambda flush: flush.items), data=st.data())
def test_a_changed_byte_is_noticed(flush: Flush, data: st.DataObject) -> None:
    batch, header = protocol.encode_flush(flush)
    column = data.draw(st.sampled_from(["start", "blocks", "hidden"]))
    row = data.draw(st.integers(0, len(flush.items) - 1))
    values = batch.column(column).to_pylist()
    if column == "hidden":
        values[row] = bytes([values[row][0] ^ 1]) + values[row][1:]
    elif column == "blocks":
        values[row] = [*values[row][:-1], values[row][-1] ^ 1]
    else:
        values[row] ^= 1
    place = batch.schema.get_field_index(column)
    changed = batch.set_column(
        place, batch.schema.field(place), pa.array(values, batch.schema.field(place).type)
    )
    with pytest.raises(ProtocolError, match="checksum"):
        protocol.decode_flush(changed, header, HELLO)


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
        (Flush(0, [], [item(start=3)]), "sequence 7: rows 3 to 5 do not fit into 1 blocks of 4"),
        (Flush(0, [], [item(num_outputs=3)]), "3 outputs do not fit into 2 rows"),
        (Flush(0, [], [item(copied=[0, 1])]), "2 copied rows and 1 outputs do not fit into 2 row"),
        (Flush(0, [], [item(copied=[2])]), r"copied rows \[2\] are not some of 2 rows"),
        (Flush(0, [], [item(copied=[0, 0])]), r"copied rows \[0, 0\] are not some of 2 rows"),
        (Flush(0, [], [item(hidden=torch.zeros(1, 1).bfloat16())]), "2 bytes are no rows of 3"),
    ],
)
def test_what_contradicts_the_lease_or_itself_is_refused(wrong: Flush, message: str) -> None:
    batch, header = protocol.encode_flush(wrong)
    with pytest.raises(ProtocolError, match=message):
        protocol.decode_flush(batch, header, HELLO)


def test_greetings_must_agree_in_all_but_the_blocks() -> None:
    fields = json.loads(HELLO.encode())
    assert Hello.decode(HELLO.encode()) == HELLO
    HELLO.check(Hello(**{**fields, "num_blocks": 3}))
    for name in fields.keys() - {"num_blocks", "version"}:
        value = fields[name]
        other = Hello(**{**fields, name: f"{value}x" if isinstance(value, str) else value + 1})
        with pytest.raises(ProtocolError, match=f"^{name} is .* deploy both from the same"):
            HELLO.check(other)


@pytest.mark.parametrize("greeting", [b"", b"[]", b"hi", b'{"version": 1}', None])
def test_what_is_no_greeting_is_refused(greeting: bytes | None) -> None:
    with pytest.raises(ProtocolError, match="cannot be read"):
        Hello.decode(greeting)


def test_another_version_is_refused_by_name() -> None:
    later = json.dumps({"version": protocol.VERSION + 1, "new_field": 1}).encode()
    with pytest.raises(ProtocolError, match="version 2 of the protocol, this end 1: install"):
        Hello.decode(later)
