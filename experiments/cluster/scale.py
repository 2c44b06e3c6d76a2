"""How far one store and one router reach: 1,000 replicas, 10 million blocks.

    python -m experiments.cluster.scale --json scale.json

The directory and the router are simulated in one process (``fathom.bench.directory``); one real
shard on a small Ray shows what a call through Ray adds. About three minutes and 4 GB of memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import multiprocessing
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from rich.console import Console
from rich.table import Table

from fathom.bench.directory import CHAIN, Timing, measure_routing, measure_shards, time_calls
from fathom.kvstore.ray_store import RayKVStore, start_store, stop_store

_STORE = "scale"
_CHAINS = 300
_AWAY = 64


def measure_actor(*, block_bytes: int = 1024, calls: int = 1000) -> dict[str, Any]:
    """One real shard on a Ray of its own.

    Returns:
        ``Timing`` of a lookup of ``CHAIN`` blocks by one client, lookups/s with ``_AWAY`` calls
        under way, the shard's CPU a call, and its memory a block, Ray's account of it included.
    """

    def figures(_shard: Any) -> tuple[float, int]:
        """CPU seconds and own memory in bytes. A local function: Ray sends it whole."""
        process = psutil.Process()
        used = process.cpu_times()
        return used.user + used.system, process.memory_full_info().uss

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=512 << 20,
    )
    try:
        shards = start_store(_STORE, shards=1, budget_bytes=1 << 40)
        store, shard = RayKVStore(shards), shards[0]
        ray.get(shard.stats.remote())
        draw = random.Random(0)
        chains = [[draw.randbytes(16) for _ in range(CHAIN)] for _ in range(_CHAINS)]
        before = ray.get(shard.__ray_call__.remote(figures))
        blocks = np.zeros((CHAIN, block_bytes), np.uint8)
        start = time.perf_counter()
        for keys in chains:
            ray.get(shard.publish.remote(keys, blocks))
        publish_s = time.perf_counter() - start
        filled = ray.get(shard.__ray_call__.remote(figures))

        def look_up(keys: Sequence[bytes]) -> None:
            assert len(store.lookup(keys)) == CHAIN

        asked = [draw.choice(chains) for _ in range(calls)]
        alone = time_calls(lambda k=keys: look_up(k) for keys in asked)
        middle = ray.get(shard.__ray_call__.remote(figures))
        away: list[Any] = []
        start = time.perf_counter()
        for keys in asked:
            away.append(shard.lookup.remote(keys))
            if len(away) == _AWAY:
                ray.get(away.pop(0))
        ray.get(away)
        many_s = time.perf_counter() - start
        after = ray.get(shard.__ray_call__.remote(figures))
        stop_store(_STORE, shards=1)
    finally:
        ray.shutdown()
    listed = _CHAINS * CHAIN
    return {
        "blocks": listed,
        "lookup": alone,
        "lookups_per_s": calls / many_s,
        "shard_cpu_ms_a_lookup": (after[0] - middle[0]) / calls * 1000,
        "publish_ms_a_chain": publish_s / _CHAINS * 1000,
        "shard_cpu_ms_a_publish": (filled[0] - before[0]) / _CHAINS * 1000,
        "shard_bytes_a_block": (filled[1] - before[1]) / listed,
    }


def _apart(function: Callable[..., dict[str, Any]], **arguments: Any) -> dict[str, Any]:
    """In a process of its own, whose memory nothing has used before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, (), arguments)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print tables, and write all figures where ``--json`` says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=10_000_000, help="of the whole store")
    parser.add_argument("--shards", default="16,1", help="numbers of shards, one run each")
    parser.add_argument("--entries", type=int, default=1_000_000, help="prefixes of the router")
    parser.add_argument("--no-ray", action="store_true", help="leave the real shard out")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(argv)

    stores = [
        _apart(measure_shards, blocks=given.blocks, shards=int(count), replicas=given.replicas)
        for count in given.shards.split(",")
    ]
    actor = None if given.no_ray else _apart(measure_actor)
    routers = [
        _apart(measure_routing, replicas=given.replicas, entries=given.entries, step_tokens=step)
        for step in (16, 32)
    ]
    _print(stores, actor, routers)
    if given.json:
        found = {"stores": stores, "actor": actor, "routers": routers}
        given.json.write_text(json.dumps(found, indent=2, default=dataclasses.asdict) + "\n")


def _print(
    stores: Sequence[dict[str, Any]],
    actor: dict[str, Any] | None,
    routers: Sequence[dict[str, Any]],
) -> None:
    console = Console(width=150)
    table = Table(title=f"Directory: calls are of chains of {CHAIN} blocks, figures of one shard")
    for heading in (
        "shards", "blocks a shard", "fullest / mean", "index bytes/block", "lookups/CPU s",
        "p99, us", "misses/CPU s", "publishes + evictions/CPU s", "p99, us", "gc, ms",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for store in stores:
        table.add_row(
            str(store["shards"]), f"{store['blocks_a_shard']:,}",
            f"{store['fullest_over_mean']:.2f}",
            f"{store['index_bytes_a_block']:.0f}", *_rate(store["lookup"]),
            _rate(store["miss"])[0], *_rate(store["publish_and_evict"]),
            f"{store['gc_pause_ms']:.0f}",
        )  # fmt: skip
    console.print(table)
    if actor:
        each: Timing = actor["lookup"]
        console.print(
            f"One real shard, {actor['blocks']:,} blocks:\n"
            f"a lookup takes {each.p50_us / 1000:.2f} ms (p99 {each.p99_us / 1000:.2f})\n"
            f"{actor['lookups_per_s']:.0f} lookups/s with {_AWAY} under way, "
            f"{actor['shard_cpu_ms_a_lookup']:.2f} ms of the shard's CPU each\n"
            f"a publish takes {actor['publish_ms_a_chain']:.1f} ms "
            f"({actor['shard_cpu_ms_a_publish']:.1f} ms of the shard's CPU)\n"
            f"{actor['shard_bytes_a_block']:.0f} bytes of the shard's memory a block"
        )
    table = Table(title="Routing decision, us (wall p50, p99; CPU p50, p99)")
    for heading in (
        "replicas",
        "prefixes",
        "step",
        "bytes/prefix",
        "known prompt",
        "new",
        "session",
    ):
        table.add_column(heading, justify="right")
    for router in routers:
        table.add_row(
            str(router["replicas"]), f"{router['entries']:,}", str(router["step_tokens"]),
            f"{router['bytes_an_entry']:.0f}",
            *(_times(router[kind]) for kind in ("known_prompt", "new_prompt", "session")),
        )  # fmt: skip
    console.print(table)


def _rate(timing: Timing) -> tuple[str, str]:
    return f"{timing.calls_per_cpu_s:,.0f}", f"{timing.cpu_p99_us:.0f}"


def _times(t: Timing) -> str:
    return f"{t.p50_us:.0f}, {t.p99_us:.0f}; {t.cpu_p50_us:.0f}, {t.cpu_p99_us:.0f}"


if __name__ == "__main__":
    main()
