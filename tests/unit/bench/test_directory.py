"""The simulation of directory and router, small: figures are there and mean what they say."""

from __future__ import annotations

from fathom.bench.directory import CHAIN, measure_routing, measure_shards


def test_shards_are_filled_and_asked() -> None:
    found = measure_shards(blocks=20_000, shards=2, replicas=50)
    assert found["blocks"] <= 20_000 + CHAIN
    assert found["blocks_a_shard"] == found["blocks"] // 2
    assert 1 <= found["fullest_over_mean"] <= 2
    assert found["evicted_a_publish"] > CHAIN * 0.9  # the store is full
    assert found["lookup"].calls > 20
    for kind in ("lookup", "miss", "publish_and_evict"):
        assert 0 < found[kind].cpu_p50_us <= found[kind].cpu_p99_us
        assert found[kind].calls_per_cpu_s > 0


def test_the_router_decides_by_prefix_load_and_session() -> None:
    found = measure_routing(replicas=20, entries=5000, prompt_tokens=500, decisions=50)
    assert set(found["reasons"]) == {"prefix", "load", "session"}
    assert sum(found["reasons"].values()) == 150
    for kind in ("known_prompt", "new_prompt", "session"):
        assert found[kind].calls == 50
        assert 0 < found[kind].p50_us <= found[kind].p99_us
