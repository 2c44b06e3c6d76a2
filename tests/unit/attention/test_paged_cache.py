"""The paged cache holds what contiguous caches would, whatever is appended, cut, forked, freed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fathom.attention.backend import RaggedBatch
from fathom.attention.blocks import NULL_BLOCK
from fathom.attention.paged_cache import PagedKVCache
from fathom.attention.pool import KVPool
from fathom.kvstore.keys import KeyRoot, extend_keys

BLOCK = 4
ROOT = KeyRoot("weights", "", 0, 2, "float32", "")


def make_pool(num_blocks: int = 12) -> KVPool:
    return KVPool(
        num_layers=2,
        num_kv_heads=1,
        head_dim=2,
        num_blocks=num_blocks,
        block_size=BLOCK,
        dtype=torch.float32,
    )


def make_cache(num_blocks: int = 12) -> PagedKVCache:
    return PagedKVCache(num_blocks, BLOCK, make_pool(num_blocks))


def slots(cache: PagedKVCache, pool: KVPool, seq_id: int, start: int, stop: int) -> torch.Tensor:
    return RaggedBatch.build([cache.rows(seq_id, start, stop - start)], pool).slots


def content(tokens: list[int], position: int) -> torch.Tensor:
    """Keys and values depend on all tokens up to a position, as a causal model's do."""
    seed = hash(tuple(tokens[: position + 1])) % 100_003
    return torch.arange(2 * 2 * 2, dtype=torch.float32).view(2, 2, 2) + seed


class PagedAgainstContiguous(RuleBasedStateMachine):
    """Runs random operations on the paged cache and on plain lists of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool()
        self.cache = PagedKVCache(self.pool.num_blocks, BLOCK, self.pool)
        self.tokens: dict[int, list[int]] = {}
        self.next_id = 0

    def new_id(self) -> int:
        self.next_id += 1
        return self.next_id

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.tokens)))

    def write(self, seq_id: int, start: int) -> None:
        tokens = self.tokens[seq_id]
        places = slots(self.cache, self.pool, seq_id, start, len(tokens))
        for layer in range(2):
            rows = [content(tokens, p)[layer] for p in range(start, len(tokens))]
            if rows:
                self.pool.write(layer, places, torch.stack(rows))

    @rule(tokens=st.lists(st.integers(0, 2), min_size=1, max_size=14))
    def open_with_prefix(self, tokens: list[int]) -> None:
        keys: list[bytes] = []
        extend_keys(keys, ROOT, tokens, BLOCK)
        hits = self.cache.match(keys)
        seq_id = self.new_id()
        self.cache.open(seq_id, keys[:hits])
        self.tokens[seq_id] = tokens[: hits * BLOCK]
        self.append_tokens(seq_id, tokens[hits * BLOCK :])

    def append_tokens(self, seq_id: int, new: list[int]) -> None:
        start = len(self.tokens[seq_id])
        needed = self.cache.blocks_needed(seq_id, start + len(new))
        available = self.cache.num_available_blocks
        grown = self.cache.grow(seq_id, start + len(new))
        assert grown == (needed <= available)
        # A published block that is copied on write stays available under its key.
        assert available - (needed if grown else 0) <= self.cache.num_available_blocks <= available
        if grown:
            self.tokens[seq_id] = self.tokens[seq_id] + new
            self.write(seq_id, start)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), new=st.lists(st.integers(0, 2), min_size=1, max_size=6))
    def append(self, data: st.DataObject, new: list[int]) -> None:
        self.append_tokens(self.pick(data), new)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        seq_id = self.pick(data)
        length = data.draw(st.integers(0, len(self.tokens[seq_id])))
        self.cache.truncate(seq_id, length)
        self.tokens[seq_id] = self.tokens[seq_id][:length]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = self.pick(data)
        length = data.draw(st.integers(0, len(self.tokens[parent])))
        child = self.new_id()
        self.cache.fork(parent, child, length)
        self.tokens[child] = self.tokens[parent][:length]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        seq_id = self.pick(data)
        keys: list[bytes] = []
        extend_keys(keys, ROOT, self.tokens[seq_id], BLOCK)
        self.cache.publish(seq_id, keys)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), scrub=st.booleans())
    def free(self, data: st.DataObject, scrub: bool) -> None:
        seq_id = self.pick(data)
        self.cache.free(seq_id, scrub=scrub)
        del self.tokens[seq_id]

    @invariant()
    def holds_what_contiguous_caches_would(self) -> None:
        for seq_id, tokens in self.tokens.items():
            assert self.cache.length(seq_id) == len(tokens)
            places = slots(self.cache, self.pool, seq_id, 0, len(tokens))
            for position, slot in enumerate(places):
                expected = content(tokens, position)
                assert torch.equal(self.pool.data[:, :, slot], expected), (seq_id, position)

    @invariant()
    def counts_add_up(self) -> None:
        self.cache.check_integrity(self.tokens)

    @invariant()
    def the_null_block_stays_zero(self) -> None:
        assert not self.pool.data[:, :, NULL_BLOCK * BLOCK : (NULL_BLOCK + 1) * BLOCK].any()


TestPagedAgainstContiguous = PagedAgainstContiguous.TestCase
TestPagedAgainstContiguous.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None
)


def test_everything_is_given_back():
    cache = make_cache()
    before = cache.num_available_blocks
    cache.open(1)
    cache.grow(1, 10)
    cache.fork(1, 2, 9)
    cache.grow(2, 12)
    cache.free(1)
    cache.free(2)
    assert cache.num_available_blocks == before == cache.num_usable_blocks
    cache.check_integrity([])


def test_the_least_recently_used_prefix_is_evicted_first():
    cache = make_cache(num_blocks=4)  # 3 usable
    keys: list[list[bytes]] = [[], []]
    for seq_id, tokens in enumerate(([1] * BLOCK, [2] * BLOCK)):
        extend_keys(keys[seq_id], ROOT, tokens, BLOCK)
        cache.open(seq_id)
        cache.grow(seq_id, BLOCK)
        cache.publish(seq_id, keys[seq_id])
    cache.free(0)
    cache.free(1)
    cache.open(2)
    assert cache.grow(2, 2 * BLOCK)  # one block is free, one has to be evicted
    assert cache.match(keys[0]) == 0
    assert cache.match(keys[1]) == 1


def test_scrubbing_leaves_no_non_finite_value_behind():
    pool = make_pool()
    cache = PagedKVCache(pool.num_blocks, BLOCK, pool)
    cache.open(1)
    cache.grow(1, 6)
    pool.write(0, slots(cache, pool, 1, 0, 6), torch.full((6, 2, 2), torch.nan))
    cache.free(1, scrub=True)
    assert torch.isfinite(pool.data).all()


def test_opening_twice_and_forking_too_far_are_refused():
    cache = make_cache()
    cache.open(1)
    with pytest.raises(ValueError, match="open already"):
        cache.open(1)
    with pytest.raises(ValueError, match="the parent has 0 positions"):
        cache.fork(1, 2, 3)
