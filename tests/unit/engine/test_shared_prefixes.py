"""Engines that share a KV store: less to compute, and not a token differs."""

from __future__ import annotations

import dataclasses
import time

import pytest

from fathom.engine.engine import Engine
from fathom.kvstore.keys import extend_keys
from fathom.models.adapters import Adapter
from fathom.types import AcceptMode, ComputePolicy, FinishReason
from tests.local_store import LocalStore
from tests.unit.engine.conftest import drain, request, run, run_one
from tests.unit.engine.test_engine import random_requests

FULL = ComputePolicy(mode=AcceptMode.FULL)
LONG = list(range(3, 39)) * 3
BLOCK = 8


def settle(store: LocalStore) -> None:
    """Wait until what was offered has arrived: publishing waits for nobody."""
    before = -1
    while before != store.published:
        before = store.published
        time.sleep(0.1)


def ids(found: dict) -> dict:
    return {key: (each.ids, each.depths) for key, each in found.items()}


@pytest.fixture(scope="module")
def alone(make_engine) -> Engine:
    return make_engine()


def test_a_prefix_of_another_engine_is_not_computed_again(make_engine, alone) -> None:
    store = LocalStore()
    first, second = make_engine(store=store), make_engine(store=store)
    expected = run_one(alone, request("a", LONG, FULL))
    assert run_one(first, request("a", LONG, FULL)).ids == expected.ids
    settle(store)
    found = run_one(second, request("a", LONG, FULL))
    assert found.ids == expected.ids
    shared = (len(LONG) - 1) // BLOCK * BLOCK
    assert found.last.usage.cached_tokens == shared
    assert second.stats()["kv_store_hits"] == shared
    # Only the rest of the prompt was prefilled, in both stages.
    assert second.ledger.total.prefill_layer_tokens < 4 * (len(LONG) - shared) + 1
    # A second time it is in the engine's own pool.
    before = store.fetched
    assert run_one(second, request("b", LONG, FULL)).ids == expected.ids
    assert store.fetched == before


def test_a_conversation_goes_on_where_its_answer_was_made_elsewhere(make_engine, alone) -> None:
    store = LocalStore()
    first, second = make_engine(store=store), make_engine(store=store)
    answer = run_one(first, request("a", LONG, FULL, max_tokens=50)).ids
    settle(store)
    turn = [*LONG, *answer, 9, 9, 9]
    found = run_one(second, request("b", turn, FULL))
    assert found.ids == run_one(alone, request("b", turn, FULL)).ids
    assert found.last.usage.cached_tokens >= (len(LONG) + len(answer) - 2) // BLOCK * BLOCK


def test_another_salt_finds_nothing(make_engine) -> None:
    store = LocalStore()
    first, second = make_engine(store=store), make_engine(store=store)
    run_one(first, request("a", LONG, FULL))
    settle(store)
    other = dataclasses.replace(request("a", LONG, FULL), cache_salt="another tenant")
    assert run_one(second, other).last.usage.cached_tokens == 0


def test_what_cannot_be_fetched_is_computed(make_engine, alone) -> None:
    store = LocalStore()
    first, second = make_engine(store=store), make_engine(store=store)
    run_one(first, request("a", LONG, FULL))
    settle(store)
    store.lose_fetches = True
    found = run_one(second, request("a", LONG, FULL))
    assert found.ids == run_one(alone, request("a", LONG, FULL)).ids
    assert found.last.usage.cached_tokens == 0


def test_without_its_deep_blocks_a_prefix_goes_to_the_deep_stage_as_states(
    make_engine, alone
) -> None:
    """Exit states lie beside the shallow blocks: nothing of the shallow stage runs again."""
    store = LocalStore()
    first = make_engine(store=store)
    run_one(first, request("a", LONG, FULL))
    settle(store)
    store.forget(_deep_chain(first, LONG))
    second = make_engine(store=store)
    found = run_one(second, request("a", LONG, FULL))
    assert found.ids == run_one(alone, request("a", LONG, FULL)).ids
    shared = (len(LONG) - 1) // BLOCK * BLOCK
    assert second.stats()["kv_store_hits"] == shared
    rows = second.ledger.total
    # Two of four layers are the deep stage's; all of its prefill rows ran.
    assert rows.prefill_layer_tokens >= 2 * (len(LONG) - 1)
    assert rows.prefill_layer_tokens < 2 * len(LONG) + 2 * BLOCK


@pytest.mark.parametrize("mode", [AcceptMode.FULL, AcceptMode.EXACT])
def test_without_its_shallow_blocks_a_prefix_stops_at_the_exit(
    make_engine, alone, mode: AcceptMode
) -> None:
    """Deep keys and values wait for the shallow stage to come by."""
    store = LocalStore()
    run_one(make_engine(store=store), request("a", LONG, FULL))
    settle(store)
    store.forget(_chain(alone, LONG, stage=0))
    second = make_engine(store=store)
    compute = ComputePolicy(mode=mode)
    found = run_one(second, request("a", LONG, compute))
    assert found.ids == run_one(alone, request("b", LONG, FULL)).ids
    shared = (len(LONG) - 1) // BLOCK * BLOCK
    rows = second.ledger.total
    # Two of four layers are the shallow stage's; all of its prefill rows ran, few of the deep ones.
    assert 2 * len(LONG) <= rows.prefill_layer_tokens <= 4 * len(LONG) - 2 * shared
    second.check_integrity()


@pytest.mark.parametrize("lacking", ["all", "first", "last", "deep"])
def test_blocks_without_exit_states_are_of_use(make_engine, alone, lacking: str) -> None:
    """As vLLM makes them: keys and values alone. Without deep ones they are left out."""
    store = LocalStore()
    run_one(make_engine(store=store), request("a", LONG, FULL))
    settle(store)
    keys = _chain(alone, LONG, stage=0)
    bare = {"first": keys[:4], "last": keys[4:]}.get(lacking, keys)
    kept = 2 * 4 * BLOCK * 8 * 4  # layers, heads of keys and values, rows, head_dim, bytes
    for key in bare:
        store._blocks[key] = store._blocks[key][:kept]
    if lacking == "deep":
        store.forget(_chain(alone, LONG, stage=1)[3:])
    second = make_engine(store=store)
    found = run_one(second, request("a", LONG, FULL))
    assert found.ids == run_one(alone, request("b", LONG, FULL)).ids
    shared = (len(LONG) - 1) // BLOCK * BLOCK
    assert second.stats()["kv_store_hits"] == (3 * BLOCK if lacking == "deep" else shared)
    second.check_integrity()


def _deep_chain(engine: Engine, tokens: list[int]) -> list[bytes]:
    return _chain(engine, tokens, stage=1)


def _chain(engine: Engine, tokens: list[int], stage: int) -> list[bytes]:
    root = engine._scheduler._roots("", False)[stage]
    keys: list[bytes] = []
    extend_keys(keys, root, tokens, BLOCK)
    return keys


@pytest.mark.parametrize("budget", [40_000, 1 << 30])
@pytest.mark.parametrize("num_blocks", [60, 400])
def test_random_requests_over_three_engines(make_engine, budget: int, num_blocks: int) -> None:
    """Few blocks preempt, a small store evicts; outputs depend on neither, nor on who is asked."""
    store = LocalStore(budget)
    engines = [
        make_engine(num_blocks=num_blocks, store=store, max_num_batched_tokens=48, max_num_seqs=8)
        for _ in range(3)
    ]
    reference = make_engine(num_blocks=400, prefix_caching=False)
    requests = random_requests(90, seed=budget % 97 + num_blocks)
    found: dict = {}
    for start in range(0, len(requests), 30):
        part = requests[start : start + 30]
        for index, item in enumerate(part):
            engines[index % 3].add_request(item)
        for engine in engines:
            found.update(drain(engine))
    assert ids(found) == ids(run(reference, requests))
    assert budget < 1 << 30 or sum(engine.stats()["kv_store_hits"] for engine in engines) > 0


def test_layers_of_the_shallow_path_alone_are_shared_too(
    make_engine, exit_adapter: Adapter
) -> None:
    store = LocalStore()
    engines = [make_engine(trained=exit_adapter, store=store) for _ in range(2)]
    alone = make_engine(trained=exit_adapter)
    compute = ComputePolicy(mode=AcceptMode.FREE, exit_threshold=0.1)
    expected = run_one(alone, request("a", LONG, compute))
    for engine in engines:
        found = run_one(engine, request("a", LONG, compute))
        assert (found.ids, found.depths) == (expected.ids, expected.depths)
        settle(store)
    assert engines[1].stats()["kv_store_hits"] > 0


def test_a_request_that_is_cancelled_while_its_blocks_come_ends(make_engine) -> None:
    store = LocalStore()
    run_one(make_engine(store=store), request("a", LONG, FULL))
    settle(store)
    engine = make_engine(store=store)
    engine.add_request(request("a", LONG, FULL))
    engine._scheduler.schedule()  # admitted: its blocks are on their way
    assert engine._scheduler.running[0].in_flight
    engine.cancel("a")
    (last,) = drain(engine).values()
    assert last.last.finish_reason is FinishReason.CANCELLED
    engine.check_integrity()
