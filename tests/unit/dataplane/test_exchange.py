"""A deep stage at the far end of an exchange: the same answers, and honest ends."""

from __future__ import annotations

import dataclasses
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from fathom.dataplane import messages
from fathom.dataplane.exchange import Exchange
from fathom.dataplane.leases import Leases
from fathom.dataplane.protocol import VERSION, ProtocolError, Reply
from fathom.dataplane.tls import Tls
from fathom.engine.deep import DeepLost, FlushItem, LocalDeepStage
from tests.unit.dataplane.conftest import Deep
from tests.unit.engine.conftest import make_engine_of


@pytest.fixture
def local(decoder, model_dir) -> LocalDeepStage:
    return make_engine_of(decoder, model_dir, 64)._deep


@pytest.fixture
def deep(local) -> Iterator[Deep]:
    deep = Deep(local)
    yield deep
    deep.close()


def states(deep: Deep, rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, deep.hello.hidden_size, generator=generator)


def flush_one(stage, seq_id: int, hidden: torch.Tensor, outputs: int = 1):
    if seq_id not in stage.cache:
        stage.cache.open(seq_id)
    start = stage.cache.length(seq_id)
    assert stage.cache.grow(seq_id, start + len(hidden))
    rows = stage.cache.rows(seq_id, start, len(hidden))
    return stage.flush([FlushItem(seq_id, rows.blocks, start, hidden, outputs)])


def test_two_clients_of_one_stage_do_not_see_each_other(deep, decoder, model_dir) -> None:
    """Equal sequence numbers, equal block numbers, leases side by side."""
    half = dataclasses.replace(deep.hello, num_blocks=deep.hello.num_blocks // 2)
    clients = [deep.connect(hello=half) for _ in range(2)]
    alone = make_engine_of(decoder, model_dir, 64)._deep
    for step in range(3):
        hidden = [states(deep, 5, seed=10 * step + i) for i in range(2)]
        answers = [flush_one(c, 0, h, 5) for c, h in zip(clients, hidden, strict=True)]
        for index, answer in enumerate(answers):
            expected = flush_one(alone, index, hidden[index], 5).result().logits
            torch.testing.assert_close(answer.result(timeout=20).logits, expected)
    for client in clients:
        client.close()


def test_flushes_that_wait_share_a_pass(deep) -> None:
    passes: list[int] = []
    run = deep.stage.run
    entered, go = threading.Event(), threading.Event()

    def counted(rows, hidden):
        passes.append(len(hidden))
        entered.set()
        go.wait(10)
        return run(rows, hidden)

    deep.stage.run = counted
    client = deep.connect()
    first = flush_one(client, 0, states(deep, 3))
    assert entered.wait(10)
    others = [flush_one(client, i, states(deep, 2 + i)) for i in (1, 2, 3)]
    deadline = time.monotonic() + 10
    while deep.worker._jobs.qsize() < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    go.set()
    for answer in (first, *others):
        assert answer.result(timeout=10).logits.shape == (1, deep.hello.vocab_size)
    assert passes == [3, 3 + 4 + 5]
    client.close()


def test_a_pass_stays_within_its_rows(local) -> None:
    deep = Deep(local, max_rows=6)
    passes: list[int] = []
    run = deep.stage.run

    def counted(rows, hidden):
        passes.append(len(hidden))
        time.sleep(0.05)
        return run(rows, hidden)

    deep.stage.run = counted
    client = deep.connect()
    answers = [flush_one(client, i, states(deep, 4)) for i in range(4)]
    answers.append(flush_one(client, 9, states(deep, 11)))  # alone it may have more
    for answer in answers:
        answer.result(timeout=10)
    assert max(passes) == 11
    assert all(rows <= 6 for rows in passes[:-1])
    client.close()
    deep.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": "another"}, "token is missing or wrong"),
        ({"weights_digest": "other"}, "weights_digest is 'tiny' at the deep replica and 'other'"),
        ({"dtype": "bfloat16"}, "dtype is 'float32' at the deep replica and 'bfloat16'"),
        ({"version": 99}, f"speaks version 99 of the protocol, this end {VERSION}"),
        ({"num_blocks": 1000}, "1000 deep KV blocks are wanted, 63 can be had: lower"),
    ],
)
def test_who_does_not_fit_is_refused_with_the_reason(deep, options: dict, message: str) -> None:
    token = {"token": options.pop("token")} if "token" in options else {}
    hello = dataclasses.replace(deep.hello, **options)
    with pytest.raises(DeepLost, match=message):
        deep.connect(hello=hello, **token)
    assert deep.server.free_blocks == deep.hello.num_blocks


def test_nobody_there_is_an_error_and_no_wait(deep) -> None:
    deep.close()
    start = time.monotonic()
    with pytest.raises(DeepLost, match=r"grpc://127.0.0.1:\d+: "):
        deep.connect(deadline_s=5)
    assert time.monotonic() - start < 5


def test_a_peer_that_says_nothing_at_all_is_given_up_at_the_deadline(deep) -> None:
    """Its kernel takes the connection, as for a process that was stopped."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.monotonic()
        with pytest.raises(DeepLost):
            Exchange(
                f"grpc://127.0.0.1:{silent.getsockname()[1]}", deep.hello,
                token="t", tls=None, deadline_s=0.5,
            )  # fmt: skip
        assert time.monotonic() - start < 5


def test_a_client_that_goes_gives_its_blocks_back_clean(deep) -> None:
    client = deep.connect()
    flush_one(client, 0, torch.full((40, deep.hello.hidden_size), torch.nan)).result(timeout=10)
    assert deep.server.free_blocks == 0
    assert not torch.isfinite(deep.stage.pool.data).all()
    client.close()
    deadline = time.monotonic() + 10
    while deep.server.free_blocks == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    again = deep.connect()
    flush_one(again, 0, states(deep, 1)).result(timeout=10)  # the first one comes after scrubbing
    assert torch.isfinite(deep.stage.pool.data).all()
    again.close()


def test_a_flush_that_fails_leaves_the_exchange_open(deep) -> None:
    client = deep.connect()
    run, deep.stage.run = deep.stage.run, None
    with pytest.raises(RuntimeError, match="TypeError"):
        flush_one(client, 0, states(deep, 3)).result(timeout=10)
    deep.stage.run = run
    assert flush_one(client, 1, states(deep, 3)).result(timeout=10).logits.isfinite().all()
    client.close()


def test_a_peer_that_hangs_is_given_up_at_the_deadline(deep) -> None:
    go = threading.Event()
    run = deep.stage.run
    deep.stage.run = lambda rows, hidden: go.wait(30) and run(rows, hidden)
    client = deep.connect(deadline_s=0.5)
    start = time.monotonic()
    with pytest.raises(DeepLost, match=r"no answer within 0\.5 s"):
        flush_one(client, 0, states(deep, 3)).result(timeout=10)
    assert time.monotonic() - start < 5
    with pytest.raises(DeepLost):  # at once: it is not asked again
        flush_one(client, 1, states(deep, 3)).result(timeout=1)
    go.set()


def test_what_is_away_when_the_peer_dies_fails(deep) -> None:
    entered, go = threading.Event(), threading.Event()
    run = deep.stage.run

    def slow(rows, hidden):
        entered.set()
        go.wait(30)
        return run(rows, hidden)

    deep.stage.run = slow
    client = deep.connect(deadline_s=60)
    answers = [flush_one(client, i, states(deep, 3)) for i in range(2)]
    assert entered.wait(10)
    threading.Thread(target=deep.server.close, daemon=True).start()
    time.sleep(0.2)
    go.set()
    client.close()
    for answer in answers:
        assert answer.done()
        assert answer.exception() is None or isinstance(answer.exception(), DeepLost)


def test_a_deep_replica_that_closes_sends_its_clients_away(deep) -> None:
    client = deep.connect()
    flush_one(client, 0, states(deep, 3)).result(timeout=10)
    start = time.monotonic()
    deep.server.close()
    assert time.monotonic() - start < 4
    with pytest.raises(DeepLost, match="the deep replica closes"):
        flush_one(client, 1, states(deep, 3)).result(timeout=10)


def test_leases_are_ranges_that_come_back_whole() -> None:
    leases = Leases(10)
    first, second, third = leases.take(4), leases.take(4), leases.take(2)
    assert (first, second, third) == (1, 5, 9)
    with pytest.raises(ProtocolError, match="1 deep KV blocks are wanted, 0 can be had"):
        leases.take(1)
    leases.give_back(first, 4)
    leases.give_back(third, 2)
    with pytest.raises(ProtocolError, match="5 deep KV blocks are wanted, 4 can be had"):
        leases.take(5)
    leases.give_back(second, 4)
    assert leases.take(10) == 1
    assert leases.free == 0


def test_over_tls(local, tls: tuple[Tls, Tls]) -> None:
    deep = Deep(local, tls=tls[0])
    assert deep.server.address.startswith("grpc+tls://")
    client = deep.connect(tls=tls[1])
    assert flush_one(client, 0, states(deep, 3)).result(timeout=20).logits.isfinite().all()
    client.close()
    deep.close()


def test_a_reply_that_is_made_after_its_client_has_gone_is_dropped(
    deep: Deep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that leave with flushes under way: writing to a call that has ended is a crash."""
    encode = messages.encode_reply

    def slowly(reply: Reply) -> messages.Message:
        time.sleep(0.02)
        return encode(reply)

    monkeypatch.setattr(messages, "encode_reply", slowly)
    few = dataclasses.replace(deep.hello, num_blocks=4)
    for seed in range(40):
        client = deep.connect(hello=few)
        flush_one(client, 0, states(deep, 3, seed))
        time.sleep(0.005)
        client.close()
    client = deep.connect(hello=few)  # the server lives, and answers
    assert len(flush_one(client, 0, states(deep, 3)).result(timeout=20).best) == 1
    client.close()
