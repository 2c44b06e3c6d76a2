"""vLLM's two halves of the connector against real engines that share a store with them.

The cache is laid out as a GPU backend of vLLM's has it; vLLM itself is in the integration test.
"""

from __future__ import annotations

import pickle
import time
from pathlib import Path

import pytest
import torch

from fathom.config import ConfigError, EngineConfig
from fathom.engine.build import build_engine
from fathom.engine.engine import Engine
from fathom.kvstore.keys import extend_keys
from fathom.models.adapters import Adapter
from fathom.types import AcceptMode, ComputePolicy
from fathom.vllm.kv_keys import KVLayout
from fathom.vllm.kv_layout import Packing, write_plain
from fathom.vllm.kv_move import KVMover
from fathom.vllm.kv_schedule import Jobs, KVSchedule
from tests.local_store import LocalStore
from tests.tiny_models import save_byte_tokenizer, save_random_llama
from tests.unit.engine.conftest import request, run_one

FULL = ComputePolicy(mode=AcceptMode.FULL)
PROMPT = list(range(3, 39)) * 3
BLOCK, VLLM_BLOCK = 8, 32
SHARED = (len(PROMPT) - 1) // BLOCK * BLOCK


class Replica:
    """What vLLM does with a connector, in the order in which it does it."""

    def __init__(self, layout: KVLayout, store: LocalStore, *, saves: bool = True) -> None:
        heads, _, width = layout.layer_shape
        self.caches = [
            torch.zeros(40, heads // 2, VLLM_BLOCK, 2 * width) for _ in range(layout.num_layers)
        ]
        self.store = store
        self.schedule = KVSchedule(layout, lambda: store, saves=saves, block_size=VLLM_BLOCK)
        self.mover = KVMover(layout, self.caches, Packing(), write_plain, VLLM_BLOCK)

    def admit(self, name: str, tokens: list[int], blocks: list[int], computed: int = 0) -> Jobs:
        found = self.schedule.match(name, tokens, len(tokens), "", computed)
        self.schedule.allocated(name, blocks, found)
        self.schedule.computed(name, None, len(tokens))
        return pickle.loads(pickle.dumps(self.schedule.take()))  # as to another process

    def rows(self, blocks: list[int], count: int) -> torch.Tensor:
        """[layers, 2 * heads, count, width]."""
        ids = torch.tensor(blocks)
        return torch.stack([Packing().read(cache[ids])[:, :count] for cache in self.caches])

    def settle(self, blocks: int) -> None:
        deadline = time.monotonic() + 20
        while self.mover.stored < blocks:
            assert time.monotonic() < deadline, "nothing is stored"
            time.sleep(0.01)


def layout_of(engine: Engine) -> KVLayout:
    return KVLayout(engine._scheduler._roots.__self__)  # its plan


def settle(store: LocalStore) -> None:
    before = -1
    while before != store.published:
        before = store.published
        time.sleep(0.1)


@pytest.mark.parametrize("computed", [0, VLLM_BLOCK])
@pytest.mark.parametrize("drafting", [False, True])
def test_a_prefix_goes_from_an_engine_through_vllms_cache_to_another(
    make_engine,
    exit_adapter: Adapter,
    computed: int,
    drafting: bool,
) -> None:
    """Also the blocks of requests that draft, which have exit layers behind the model's own."""
    store, other = LocalStore(), LocalStore()
    alone = make_engine(trained=exit_adapter)
    compute = ComputePolicy(mode=AcceptMode.EXACT) if drafting else FULL
    expected = run_one(alone, request("a", PROMPT, FULL)).ids
    run_one(make_engine(trained=exit_adapter, store=store), request("a", PROMPT, compute))
    settle(store)

    replica = Replica(layout_of(alone), store, saves=False)
    blocks = [7, 2, 30, 11]
    jobs = replica.admit("a", PROMPT, blocks, computed)
    assert not jobs.saves
    (load,) = jobs.loads
    assert (load.start, load.stop) == (computed, SHARED)
    assert replica.mover.load(load, store) == set()
    rows = replica.rows(blocks, SHARED)
    assert bool((rows[:, :, computed:].abs().sum(3) > 0).all())
    assert bool((rows[:, :, :computed] == 0).all())
    if computed:
        return

    # What was filled is stored elsewhere, and serves an engine that has never seen the first.
    second = Replica(layout_of(alone), other)
    for own, filled in zip(second.caches, replica.caches, strict=True):
        own.copy_(filled)
    jobs = second.admit("a", PROMPT[:SHARED], blocks)
    assert not jobs.loads
    for save in jobs.saves:
        second.mover.save(save, other)
    second.settle(SHARED // BLOCK)
    for compute in (FULL, ComputePolicy(mode=AcceptMode.EXACT)):
        last = make_engine(trained=exit_adapter, store=other)
        assert run_one(last, request("a", PROMPT, compute)).ids == expected
        # Four layers, two of them deep; drafts have an exit layer more, which vLLM lacks.
        rest = len(PROMPT) - SHARED
        most = 4 * rest if compute is FULL else 5 * rest + 3 * SHARED
        assert last.ledger.total.prefill_layer_tokens <= most
        last.check_integrity()


def test_what_is_lost_between_finding_and_loading_is_named(make_engine) -> None:
    store = LocalStore()
    engine = make_engine(store=store)
    run_one(engine, request("a", PROMPT, FULL))
    settle(store)
    replica = Replica(layout_of(engine), store)
    (load,) = replica.admit("a", PROMPT, [5, 6, 7, 8], VLLM_BLOCK).loads
    store.lose_fetches = True
    assert replica.mover.load(load, store) == {6, 7, 8}
    assert replica.mover.load(load, None) == {6, 7, 8}
    assert all(bool((cache == 0).all()) for cache in replica.caches)


def test_what_was_computed_after_a_loss_is_not_stored(make_engine) -> None:
    """Neither by the request that lost blocks, nor by another that took them for its prefix."""
    store = LocalStore()
    engine = make_engine(store=store)
    run_one(engine, request("a", PROMPT, FULL))
    settle(store)
    replica = Replica(layout_of(engine), store)
    longer = [[*PROMPT, *range(start, start + 2 * BLOCK)] for start in (3, 13, 23)]
    lost = replica.admit("a", longer[0], [5, 6, 7, 8])
    sharing = replica.admit("b", longer[1], [5, 6, 7, 9], VLLM_BLOCK * 3)
    other = replica.admit("c", longer[2], [1, 2, 3, 4])
    store.lose_fetches = True
    assert replica.mover.load(lost.loads[0], store) == {5, 6, 7, 8}
    before = store.published
    for save in (*lost.saves, *sharing.saves, *other.saves):
        replica.mover.save(save, store)
    replica.settle(2)
    replica.mover.close()
    assert (len(lost.saves), len(sharing.saves), replica.mover.stored) == (1, 1, 2)
    assert store.published == before + 2 * 2  # of c, in both chains
    assert replica.schedule.match("d", [*longer[2], 1], len(longer[2]), "", 0) > SHARED

    replica = Replica(layout_of(engine), store)
    replica.mover.load(lost.loads[0], store)
    replica.mover.finished(["a"])
    replica.mover.save(sharing.saves[0], store)
    replica.settle(2)


def test_a_preempted_request_asks_again_and_loads_into_its_new_blocks(make_engine) -> None:
    store = LocalStore()
    engine = make_engine(store=store)
    replica = Replica(layout_of(engine), store)
    tokens = list(PROMPT)
    jobs = replica.admit("a", tokens, [0, 1, 2, 3])
    assert not jobs.loads
    replica.mover.save(jobs.saves[0], store)
    replica.settle(len(PROMPT) // BLOCK)
    tokens += [4, 5, 6]
    whole = len(PROMPT) // BLOCK * BLOCK
    assert replica.schedule.match("a", tokens, len(PROMPT), "", VLLM_BLOCK) == whole - VLLM_BLOCK
    replica.schedule.allocated("a", [0, 9, 8, 7], whole - VLLM_BLOCK)
    replica.schedule.computed("a", None, len(tokens))
    jobs = replica.schedule.take()
    (load,) = jobs.loads
    assert (load.blocks, load.start, load.stop) == ([0, 9, 8, 7], VLLM_BLOCK, whole)
    assert not jobs.saves


def test_a_long_prompt_is_stored_chunk_by_chunk_and_a_cancelled_one_as_far_as_it_got(
    make_engine,
) -> None:
    replica = Replica(layout_of(make_engine()), LocalStore())
    replica.schedule.match("a", PROMPT, len(PROMPT), "", 0)
    replica.schedule.allocated("a", [0, 1], 0)
    stored = []
    for computed, blocks in ((50, None), (100, [2, 3])):
        replica.schedule.computed("a", blocks, computed)
        (save,) = replica.schedule.take().saves
        assert not save.last
        stored.append((save.first[0], len(save.deep)))
    assert stored == [(0, 6), (6, 12)]
    # Nothing is left to be read, so nothing is waited for.
    assert not replica.schedule.finished("a", 100)
    # One that is cancelled before it has blocks is forgotten.
    replica.schedule.match("b", PROMPT, len(PROMPT), "", 0)
    assert not replica.schedule.finished("b", 0)
    assert not replica.schedule._requests


@pytest.mark.parametrize("count", [1, BLOCK - 1, BLOCK])
def test_a_prompt_of_no_more_than_a_block_is_not_sought(make_engine, count: int) -> None:
    replica = Replica(layout_of(make_engine()), LocalStore())
    jobs = replica.admit("a", PROMPT[:count], [3])
    assert not jobs.loads
    assert len(jobs.saves) == count // BLOCK
    assert not replica.schedule.finished("a", count)


@pytest.mark.parametrize("vllm_block", [12, 20])
def test_vllms_blocks_need_not_be_multiples_of_the_stores(
    make_engine, monkeypatch: pytest.MonkeyPatch, vllm_block: int
) -> None:
    monkeypatch.setitem(globals(), "VLLM_BLOCK", vllm_block)
    store, other = LocalStore(), LocalStore()
    engine = make_engine(store=store)
    expected = run_one(engine, request("a", PROMPT, FULL)).ids
    settle(store)
    replica, second = (Replica(layout_of(engine), each) for each in (store, other))
    blocks = list(range(30, 30 - len(PROMPT) // vllm_block - 1, -1))
    (load,) = replica.admit("a", PROMPT, blocks).loads
    assert replica.mover.load(load, store) == set()
    whole = replica.rows(blocks, SHARED)
    # From the middle of a block of the store's on, nothing before it is touched.
    (load,) = replica.admit("b", PROMPT, [0, *blocks[1:]], vllm_block).loads
    assert replica.mover.load(load, store) == set()
    assert torch.equal(replica.rows(blocks, SHARED), whole)
    assert all(bool((cache[0] == 0).all()) for cache in replica.caches)
    # Stored in two parts, the second from the middle of a block of vLLM's on.
    for own, filled in zip(second.caches, replica.caches, strict=True):
        own.copy_(filled)
    second.schedule.match("a", PROMPT, len(PROMPT), "", 0)
    second.schedule.allocated("a", blocks, 0)
    for computed in (5 * BLOCK, SHARED):
        second.schedule.computed("a", None, computed)
        for save in second.schedule.take().saves:
            second.mover.save(save, other)
    second.settle(SHARED // BLOCK)
    last = make_engine(store=other)
    found = run_one(last, request("a", PROMPT, FULL))
    assert (found.ids, found.last.usage.cached_tokens) == (expected, SHARED)


def test_a_store_that_raises_is_a_miss(make_engine) -> None:
    class Broken(LocalStore):
        def lookup(self, keys):
            raise RuntimeError("Ray is gone")

    replica = Replica(layout_of(make_engine()), Broken())
    jobs = replica.admit("a", PROMPT, [0, 1, 2, 3])
    assert not jobs.loads
    assert len(jobs.saves) == 1


def test_an_answer_is_stored_as_it_grows_and_its_end_when_it_ends(make_engine) -> None:
    engine = make_engine()
    replica = Replica(layout_of(engine), LocalStore())
    tokens, blocks = list(PROMPT), [0, 1, 2, 3]
    (save,) = replica.admit("a", tokens, blocks).saves
    assert (save.first, len(save.deep)) == ((0, 0), len(PROMPT) // BLOCK)
    replica.schedule.computed("a", [4, 5, 6], len(PROMPT) + 1)
    assert not replica.schedule.take().saves
    tokens += range(8 * BLOCK)
    replica.schedule.computed("a", None, len(tokens) + 5)  # drafts that may be rejected
    (save,) = replica.schedule.take().saves
    assert save.blocks == [0, 1, 2, 3, 4, 5, 6]
    assert (save.first[0], len(save.deep)) == (len(PROMPT) // BLOCK, len(tokens) // BLOCK)
    tokens += range(2 * BLOCK)
    assert replica.schedule.finished("a", len(tokens))
    (save,) = replica.schedule.take().saves
    assert save.last and len(save.deep) == (len(tokens) - 1) // BLOCK
    assert not replica.schedule.finished("a", len(tokens))


def test_the_store_is_asked_once_until_blocks_are_there(make_engine) -> None:
    store = LocalStore()
    engine = make_engine(store=store)
    run_one(engine, request("a", PROMPT, FULL))
    settle(store)
    schedule = KVSchedule(layout_of(engine), lambda: store, saves=True, block_size=VLLM_BLOCK)
    assert schedule.match("a", PROMPT, len(PROMPT), "", 0) == SHARED
    store.forget(list(store._blocks))
    assert schedule.match("a", PROMPT, len(PROMPT), "", VLLM_BLOCK) == SHARED - VLLM_BLOCK
    schedule.allocated("a", [1, 2, 3, 4], 0)
    assert schedule.match("a", PROMPT, len(PROMPT), "", 0) == 0
    assert schedule.match("b", PROMPT, len(PROMPT), "another tenant", 0) == 0
    nowhere = KVSchedule(layout_of(engine), lambda: None, saves=True, block_size=VLLM_BLOCK)
    assert nowhere.match("a", PROMPT, len(PROMPT), "", 0) == 0
    nowhere.allocated("a", [1, 2, 3, 4], 0)
    nowhere.computed("a", None, len(PROMPT))
    assert not nowhere.take().saves


def test_settings_lead_to_the_keys_of_an_engine_of_the_same_settings(tmp_path: Path) -> None:
    directory = save_random_llama(save_byte_tokenizer(tmp_path), vocab_size=257)
    settings = {"model": str(directory), "dtype": "float32", "exit_layer": 1, "block_size": 8}
    layout = KVLayout.of(settings)
    engine = build_engine(EngineConfig(**settings, kv_cache_bytes=1 << 22))
    keys = layout.no_keys()
    layout.extend(keys, PROMPT, "salt")
    for index, chain in enumerate((keys.plain, keys.deep)):
        expected: list[bytes] = []
        extend_keys(expected, engine._scheduler._roots("salt", False)[index], PROMPT, BLOCK)
        assert chain == expected
    assert keys.drafting is keys.plain  # no adapter, no exit layers
    other = KVLayout.of({**settings, "dtype": "bfloat16"})
    assert other._roots("salt")[0] != layout._roots("salt")[0]
    with pytest.raises(ConfigError, match="exit_layer"):
        KVLayout.of({**settings, "exit_layer": 99})
