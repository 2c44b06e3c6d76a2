"""The KV store on a real Ray: what is published can be read, whoever dies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import ray

from fathom.kvstore.keys import KeyRoot, extend_keys
from fathom.kvstore.ray_store import RayKVStore, start_store, stop_store
from fathom.kvstore.store import BlocksGone
from tests.ray_fixtures import TestServer

BLOCK = 4
SIZE = 200_000  # bytes: above what Ray sends inline
SHARDS = 2


def keys_of(tokens: list[int], salt: str = "") -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, KeyRoot("weights", "", 0, 8, "float32", salt), tokens, BLOCK)
    return keys


def block(value: int) -> np.ndarray:
    return np.full(SIZE, value % 251, np.uint8)


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


@pytest.fixture
def store(server: TestServer, request: pytest.FixtureRequest) -> Iterator[RayKVStore]:
    name = f"test-{request.node.name}"
    shards = start_store(name, shards=SHARDS, budget_bytes=SHARDS * 5 * SIZE)
    yield RayKVStore(shards)
    stop_store(name, shards=SHARDS)


@ray.remote(num_cpus=0)
class Publisher:
    """A replica that publishes."""

    def __init__(self, shards) -> None:
        self.store = RayKVStore(shards)

    def publish(self, tokens: list[int]) -> None:
        keys = keys_of(tokens)
        self.store.publish(keys, [block(i) for i in range(len(keys))])


def test_a_prefix_is_found_in_one_call_and_fetched_in_one(store: RayKVStore) -> None:
    keys = keys_of(list(range(16)))
    store.publish(keys, [block(i) for i in range(4)])
    until(lambda: len(store.lookup(keys)) == 4)
    hits = store.lookup([*keys[:3], *keys_of([9, 9, 9, 9])])
    assert len(hits) == 3
    for index, found in enumerate(hits.fetch()):
        assert np.array_equal(found, block(index))
        assert not found.flags.writeable
    assert len(store.lookup(keys_of(list(range(16)), salt="another tenant"))) == 0
    assert len(store.lookup([])) == 0


def test_later_blocks_of_a_chain_are_published_alone(store: RayKVStore) -> None:
    keys = keys_of(list(range(16)))
    store.publish(keys[:2], [block(0), block(1)])
    until(lambda: len(store.lookup(keys)) == 2)
    store.publish(keys, [block(2), block(3)])
    until(lambda: len(store.lookup(keys)) == 4)
    assert np.array_equal(store.lookup(keys).fetch()[3], block(3))


def test_blocks_outlive_who_published_them(store: RayKVStore) -> None:
    publisher = Publisher.remote(store._shards)
    tokens = list(range(100, 112))
    ray.get(publisher.publish.remote(tokens))
    until(lambda: len(store.lookup(keys_of(tokens))) == 3)
    ray.kill(publisher)
    until(lambda: _is_dead(publisher))
    found = store.lookup(keys_of(tokens)).fetch()
    assert [int(each[0]) for each in found] == [0, 1, 2]


def _is_dead(actor) -> bool:
    try:
        ray.get(actor.publish.remote([]), timeout=5)
    except ray.exceptions.RayActorError:
        return True
    return False


def test_the_least_recently_used_goes_first_and_what_is_held_stays(store: RayKVStore) -> None:
    """A shard holds five blocks here."""
    chains = [keys_of([n] * BLOCK) for n in range(60)]
    same = [keys for keys in chains if store._place(keys) == 0][:7]
    for number, keys in enumerate(same[:5]):
        store.publish(keys, [block(number)])
        until(lambda keys=keys: len(store.lookup(keys)) == 1)
    held = store.lookup(same[1])
    store.lookup(same[0])  # used again
    for number, keys in enumerate(same[5:7], 5):
        store.publish(keys, [block(number)])
        until(lambda keys=keys: len(store.lookup(keys)) == 1)
    assert [len(store.lookup(keys)) for keys in same] == [1, 1, 0, 0, 1, 1, 1]
    stats = store.stats()
    assert (stats.blocks, stats.bytes, stats.evicted) == (5, 5 * SIZE, 2)
    store.publish(keys_of([77] * BLOCK), [np.zeros(6 * SIZE, np.uint8)])  # more than a shard has
    for number in range(8, 20):
        store.publish(chains[number + 20], [block(number)])
    until(lambda: len(store.lookup(same[1])) == 0)
    assert np.array_equal(held.fetch()[0], block(1))


def looked_up_soon(store: RayKVStore, keys: list[bytes]) -> int:
    """Blocks found, without an error and without a long wait, whatever the shard goes through."""
    start = time.monotonic()
    found = len(store.lookup(keys))
    assert time.monotonic() - start < 2
    return found


def test_a_lost_shard_costs_hits_and_comes_back_empty(store: RayKVStore) -> None:
    keys = keys_of(list(range(8)))
    store.publish(keys, [block(0), block(1)])
    until(lambda: len(store.lookup(keys)) == 2)
    hits = store.lookup(keys)
    ray.kill(store._shards[store._place(keys)], no_restart=False)
    until(lambda: not looked_up_soon(store, keys))  # Ray's kill returns before the process ends
    store.publish(keys, [block(0)])
    with pytest.raises(BlocksGone):
        until(lambda: not hits.fetch(), seconds=30)  # its owner is gone
    store._avoid_until = [0.0] * SHARDS
    store.publish(keys[:1], [block(0)])
    until(lambda: len(store.lookup(keys)) == 1)
