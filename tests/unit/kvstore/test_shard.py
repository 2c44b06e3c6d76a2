"""A shard's directory against a slow one, and what holds for it whatever is asked of it."""

from __future__ import annotations

import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.kvstore.shard import ShardIndex

Chain = list[bytes]


class Block:
    """Stands for an object of Ray's: it lives as long as somebody holds it."""

    def __init__(self, key: bytes) -> None:
        self.key = key


def chain(path: bytes) -> Chain:
    """Keys that name all tokens before them, as hashes do."""
    return [path[: end + 1] for end in range(len(path))]


def size_of(key: bytes) -> int:
    return 1 + (key[-1] + len(key)) % 3


class SlowShard:
    """The rules, written down without a thought of speed."""

    def __init__(self, budget: int) -> None:
        self.budget, self.clock = budget, 0
        self.used: dict[bytes, int] = {}
        self.evicted = 0

    def bytes(self) -> int:
        return sum(map(size_of, self.used))

    def touch(self, keys: Chain) -> None:
        for key in reversed(keys):
            self.clock += 1
            self.used[key] = self.clock

    def lookup(self, keys: Chain) -> Chain:
        found = []
        for key in keys:
            if key not in self.used:
                break
            found.append(key)
        self.touch(found)
        return found

    def publish(self, keys: Chain, count: int) -> None:
        here = self.lookup(keys)
        if len(here) < len(keys) - count:
            return
        for key in keys[len(here) :]:
            others = sorted(set(self.used) - set(here), key=self.used.__getitem__)
            if size_of(key) + sum(map(size_of, here)) > self.budget:
                break  # there is no room without taking of the chain itself
            while self.bytes() + size_of(key) > self.budget:
                del self.used[others.pop(0)]
                self.evicted += 1
            here.append(key)
            self.touch(here)


# Few tokens, so that chains share their beginnings.
paths = st.binary(min_size=1, max_size=6).map(lambda raw: bytes(byte % 3 for byte in raw))
actions = st.one_of(
    st.tuples(st.just("lookup"), paths, st.just(0)),
    st.tuples(st.just("publish"), paths, st.integers(1, 6)),
    st.tuples(st.just("release"), paths, st.just(0)),
)


@given(budget=st.integers(0, 20), steps=st.lists(actions, max_size=60))
def test_it_keeps_what_a_slow_shard_keeps(budget: int, steps: list[tuple[str, bytes, int]]) -> None:
    shard: ShardIndex[Block] = ShardIndex(budget)
    slow = SlowShard(budget)
    alive: weakref.WeakSet[Block] = weakref.WeakSet()
    listed: dict[bytes, weakref.ref[Block]] = {}
    held: list[Block] = []
    asked = hits = 0
    for action, path, count in steps:
        keys = chain(path)
        if action == "lookup":
            found = shard.lookup(keys)
            assert [block.key for block in found] == slow.lookup(keys)
            held += found
            asked, hits = asked + 1, hits + len(found)
        elif action == "release":
            held = []
        else:
            count = min(count, len(keys))
            offered = keys[-count:]

            def put(index: int, offered: Chain = offered) -> Block:
                block = Block(offered[index])
                alive.add(block)
                listed[block.key] = weakref.ref(block)
                return block

            before = set(slow.used)
            taken = shard.publish(keys, [size_of(key) for key in offered], put)
            slow.publish(keys, count)
            assert taken == len(set(slow.used) - before)

        stats = shard.stats()
        assert stats.bytes == slow.bytes() <= budget
        assert (stats.blocks, stats.evicted) == (len(slow.used), slow.evicted)
        assert (stats.lookups, stats.hits) == (asked, hits)
        # Whatever is listed can be found: its whole chain is here.
        assert all(key[:end] in slow.used for key in slow.used for end in range(1, len(key)))
        # Blocks live while they are listed or held, and not longer.
        found = []
        assert set(alive) == {*held, *(listed[key]() for key in slow.used)}


def test_a_block_above_the_budget_is_not_taken_and_costs_nothing() -> None:
    shard: ShardIndex[str] = ShardIndex(10)
    assert shard.publish([b"a"], [4], lambda _: "a") == 1
    assert shard.publish([b"b", b"bb"], [11, 1], lambda _: "b") == 0
    assert shard.lookup([b"a"]) == ["a"]
    assert shard.stats().evicted == 0


def test_of_a_chain_that_is_longer_than_the_budget_the_beginning_stays() -> None:
    shard: ShardIndex[int] = ShardIndex(10)
    shard.publish([b"old"], [3], lambda _: -1)
    keys = chain(b"abcdef")
    assert shard.publish(keys, [3] * 6, lambda index: index) == 3
    assert shard.lookup(keys) == [0, 1, 2]
    assert shard.lookup([b"old"]) == []


def test_what_follows_on_a_lost_block_is_not_taken() -> None:
    """A shard that came back empty is offered the rest of a chain that it had once."""
    shard: ShardIndex[int] = ShardIndex(10)
    keys = chain(b"abc")
    assert shard.publish(keys, [1], lambda _: 2) == 0
    assert shard.publish(keys, [1, 1, 1], lambda index: index) == 3


def test_only_new_blocks_are_put() -> None:
    shard: ShardIndex[int] = ShardIndex(10)
    put: list[int] = []

    def make(index: int) -> int:
        put.append(index)
        return index

    shard.publish(chain(b"ab"), [1, 1], make)
    shard.publish(chain(b"abcd"), [1, 1, 1], make)  # blocks b, c, d
    assert put == [0, 1, 1, 2]
    assert shard.stats().blocks == 4


@pytest.mark.parametrize("keys", [[b"x", b"x"], [b"y", b"x", b"y"]])
def test_keys_that_are_no_chain_do_not_upset_the_account(keys: Chain) -> None:
    shard: ShardIndex[int] = ShardIndex(4)
    shard.publish([b"x"], [2], lambda _: 0)
    shard.publish(keys, [2] * len(keys), lambda index: index)
    stats = shard.stats()
    assert stats.bytes == 2 * stats.blocks <= 4
