"""A shard's directory against a slow one, and what holds for it whatever is asked of it."""

from __future__ import annotations

import weakref

from hypothesis import given
from hypothesis import strategies as st

from fathom.kvstore.shard import EXTENT, ShardIndex

Chain = list[bytes]


class Blocks:
    """Stands for an object of Ray's: it lives as long as somebody holds it."""

    def __init__(self, keys: Chain) -> None:
        self.keys = keys


def chain(path: bytes) -> Chain:
    """Keys that name all tokens before them, as hashes do."""
    return [path[: end + 1] for end in range(len(path))]


class SlowShard:
    """The rules, written down without a thought of speed: each block with its extent."""

    def __init__(self, budget: int) -> None:
        self.budget, self.clock, self.evicted = budget, 0, 0
        self.extents: dict[tuple[bytes, ...], tuple[int, int]] = {}  # last use, bytes

    def listed(self) -> set[bytes]:
        return {key for extent in self.extents for key in extent}

    def bytes(self) -> int:
        return sum(size for _, size in self.extents.values())

    def of(self, keys: Chain) -> list[tuple[bytes, ...]]:
        return [e for key in keys for e in self.extents if e[0] == key]

    def lookup(self, keys: Chain) -> Chain:
        found: Chain = []
        for key in keys:
            if key not in self.listed():
                break
            found.append(key)
        for extent in reversed(self.of(found)):
            self.clock += 1
            self.extents[extent] = self.clock, self.extents[extent][1]
        return found

    def publish(self, keys: Chain, count: int, size: int) -> None:
        here = len(self.lookup(keys))
        if here < len(keys) - count:
            return
        while here < len(keys):
            own = sum(self.extents[extent][1] for extent in self.of(keys[:here]))
            new = keys[here : here + EXTENT]
            while new and own + len(new) * size > self.budget:
                new.pop()
            if not new:
                return
            others = [e for e in self.extents if e not in self.of(keys[:here])]
            others.sort(key=lambda extent: self.extents[extent][0])
            while self.bytes() + len(new) * size > self.budget:
                self.evicted += len(others[0])
                del self.extents[others.pop(0)]
            self.extents[tuple(new)] = 0, len(new) * size
            here += len(new)
            self.lookup(keys[:here])


# Few tokens, so that chains share their beginnings; long enough for several extents.
paths = st.binary(min_size=1, max_size=20).map(lambda raw: bytes(byte % 2 for byte in raw))
actions = st.one_of(
    st.tuples(st.just("lookup"), paths, st.just(0)),
    st.tuples(st.just("publish"), paths, st.integers(1, 20)),
    st.tuples(st.just("release"), paths, st.just(0)),
)


@given(budget=st.integers(0, 60), size=st.integers(1, 3), steps=st.lists(actions, max_size=40))
def test_it_keeps_what_a_slow_shard_keeps(
    budget: int, size: int, steps: list[tuple[str, bytes, int]]
) -> None:
    shard: ShardIndex[Blocks] = ShardIndex(budget)
    slow = SlowShard(budget)
    alive: weakref.WeakSet[Blocks] = weakref.WeakSet()
    listed: dict[tuple[bytes, ...], weakref.ref[Blocks]] = {}
    held: list[Blocks] = []
    asked = hits = 0
    for action, path, count in steps:
        keys = chain(path)
        if action == "lookup":
            pieces = shard.lookup(keys)
            found = [key for blocks, used in pieces for key in blocks.keys[:used]]
            assert found == slow.lookup(keys)
            held += [blocks for blocks, _ in pieces]
            asked, hits = asked + 1, hits + len(found)
            pieces = []
        elif action == "release":
            held = []
        else:
            count = min(count, len(keys))
            offered = keys[-count:]

            def put(first: int, last: int, offered: Chain = offered) -> Blocks:
                blocks = Blocks(offered[first:last])
                alive.add(blocks)
                listed[tuple(blocks.keys)] = weakref.ref(blocks)
                return blocks

            before = slow.listed()
            taken = shard.publish(keys, count, size, put)
            slow.publish(keys, count, size)
            assert taken == len(slow.listed() - before)

        stats = shard.stats()
        assert stats.bytes == slow.bytes() <= budget
        assert (stats.blocks, stats.evicted) == (len(slow.listed()), slow.evicted)
        assert (stats.lookups, stats.hits) == (asked, hits)
        # Whatever is listed can be found: its whole chain is here.
        assert all(
            key[:end] in slow.listed() for key in slow.listed() for end in range(1, len(key))
        )
        # Blocks live while they are listed or held, and not longer.
        assert set(alive) == {*held, *(listed[extent]() for extent in slow.extents)}


def lengths(shard: ShardIndex[object], keys: Chain) -> list[int]:
    return [used for _, used in shard.lookup(keys)]


def put(first: int, last: int) -> object:
    return first, last


def test_a_block_above_the_budget_is_not_taken_and_costs_nothing() -> None:
    shard: ShardIndex[object] = ShardIndex(10)
    assert shard.publish([b"a"], 1, 4, put) == 1
    assert shard.publish([b"b", b"bb"], 2, 11, put) == 0
    assert lengths(shard, [b"a"]) == [1]
    assert shard.stats().evicted == 0


def test_of_a_chain_that_is_longer_than_the_budget_the_beginning_stays() -> None:
    shard: ShardIndex[object] = ShardIndex(10 * 3 + 2)
    shard.publish([b"old"], 1, 3, put)
    keys = chain(b"abcdefghijklmno")
    assert shard.publish(keys, 15, 3, put) == 10
    assert shard.lookup(keys) == [((0, 8), 8), ((8, 10), 2)]
    assert lengths(shard, [b"old"]) == []


def test_what_follows_on_a_lost_block_is_not_taken() -> None:
    """A shard that came back empty is offered the rest of a chain that it had once."""
    shard: ShardIndex[object] = ShardIndex(10)
    keys = chain(b"abc")
    assert shard.publish(keys, 1, 1, put) == 0
    assert shard.publish(keys, 3, 1, put) == 3


def test_only_new_blocks_are_put() -> None:
    shard: ShardIndex[object] = ShardIndex(100)
    made: list[tuple[int, int]] = []

    def note(first: int, last: int) -> object:
        made.append((first, last))
        return len(made)

    shard.publish(chain(b"ab"), 2, 1, note)
    shard.publish(chain(b"abcd"), 3, 1, note)  # offers b, c, d
    shard.publish(chain(b"abcdefghijklmnop"), 16, 1, note)
    assert made == [(0, 2), (1, 3), (4, 12), (12, 16)]
    assert lengths(shard, chain(b"abcdefghijklmnop")) == [2, 2, 8, 4]


def test_a_chain_that_turns_off_within_an_extent_has_a_part_of_it() -> None:
    shard: ShardIndex[object] = ShardIndex(100)
    shard.publish(chain(b"abcdef"), 6, 1, put)
    assert lengths(shard, chain(b"abcxyz")) == [3]
    assert shard.publish(chain(b"abcxyz"), 6, 1, put) == 3
    assert shard.lookup(chain(b"abcxyz")) == [((0, 6), 3), ((3, 6), 3)]
    assert lengths(shard, chain(b"abcdef")) == [6]
