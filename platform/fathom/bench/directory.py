"""How far the directory of KV blocks and the router reach: simulated, in one process, without Ray.

Replicas and blocks are only names here; what is measured is the code that a shard and an ingress
run for each call. Wall time counts whatever else the machine does, CPU time does not.
"""

from __future__ import annotations

import gc
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from fathom.kvstore.keys import BlockKey
from fathom.kvstore.shard import ShardIndex
from fathom.routing.policy import Choice, RoutingConfig, RoutingPolicy
from fathom.types import Request

CHAIN = 62
"""Blocks of a prompt of 1,000 tokens, at 16 tokens a block."""
SHARED = 16
"""Leading blocks of a chain that other chains have too: a system prompt."""
CHAINS_A_PROMPT = 100
_SAMPLED = 2000


@dataclass(frozen=True, slots=True)
class Timing:
    """Times of single calls, in microseconds: wall (median, 99th percentile) and CPU."""

    calls: int
    p50_us: float
    p99_us: float
    cpu_p50_us: float
    cpu_p99_us: float

    @property
    def calls_per_cpu_s(self) -> float:
        """Calls that one core can do in a second."""
        return 1e6 / self.cpu_p50_us


def time_calls(calls: Iterable[Callable[[], Any]]) -> Timing:
    """Time each call alone."""
    wall: list[float] = []
    cpu: list[float] = []
    for call in calls:
        cpu_start, start = time.thread_time_ns(), time.perf_counter_ns()
        call()
        wall.append((time.perf_counter_ns() - start) / 1000)
        cpu.append((time.thread_time_ns() - cpu_start) / 1000)
    return Timing(len(wall), *_percentiles(wall), *_percentiles(cpu))


def _percentiles(values: list[float]) -> tuple[float, float]:
    values.sort()
    return values[len(values) // 2], values[len(values) * 99 // 100]


class _Reference:
    """As large as nothing can be that the garbage collector must look at, as Ray's reference."""

    __slots__ = ("number",)

    def __init__(self, first: int, last: int) -> None:
        self.number = first


def measure_shards(
    *, blocks: int, shards: int, replicas: int = 1000, block_bytes: int = 1 << 20, seed: int = 0
) -> dict[str, Any]:
    """Fill the cores of all shards of a store, then ask one of them.

    The replicas take turns to publish prompts of ``CHAIN`` blocks, of which ``SHARED`` belong to
    the system prompt of ``CHAINS_A_PROMPT`` prompts. What a replica published, any looks up.

    Args:
        blocks: of the whole store, which is then full to its budget.

    Returns:
        Figures of one shard (``Timing``s of calls of whole chains) and of the store's balance.
    """
    draw = random.Random(seed)
    store = [ShardIndex[_Reference](blocks // shards * block_bytes) for _ in range(shards)]
    sampled: list[list[BlockKey]] = []
    gc.collect()
    memory = psutil.Process().memory_info().rss
    start = time.process_time()
    placed = [0] * shards
    count = 0
    system: list[BlockKey] = []
    by_replica: deque[list[BlockKey]] = deque(maxlen=replicas)
    while sum(placed) < blocks:
        if count % CHAINS_A_PROMPT == 0:
            system = _keys(draw, SHARED)
        keys = system + _keys(draw, CHAIN - SHARED)
        home = _home(keys, shards)
        placed[home] += store[home].publish(keys, CHAIN, block_bytes, _Reference)
        count += 1
        by_replica.append(keys)
        if draw.random() < _SAMPLED * CHAIN / blocks:
            sampled.append(keys)
    fill_s = time.process_time() - start
    gc.collect()
    held = sum(shard.stats().blocks for shard in store)
    memory = psutil.Process().memory_info().rss - memory
    pause = _pause()

    def look_up(keys: Sequence[BlockKey]) -> int:
        return sum(count for _, count in store[_home(keys, shards)].lookup(keys))

    # What a shard with more than its share has evicted is no hit.
    sampled = [keys for keys in (*sampled, *by_replica) if look_up(keys) == CHAIN]
    draw.shuffle(sampled)
    lookups = time_calls(lambda k=keys: look_up(k) for keys in sampled)  # type: ignore[misc]
    fresh = [_keys(draw, CHAIN) for _ in range(_SAMPLED)]
    misses = time_calls(lambda k=keys: look_up(k) for keys in fresh)  # type: ignore[misc]
    _top_up(store, draw, block_bytes)
    evicted = sum(shard.stats().evicted for shard in store)
    publishes = time_calls(
        lambda k=keys: store[_home(k, shards)].publish(k, CHAIN, block_bytes, _Reference)  # type: ignore[misc]
        for keys in fresh
    )
    evicted = sum(shard.stats().evicted for shard in store) - evicted
    return {
        "shards": shards,
        "replicas": replicas,
        "blocks": held,
        "blocks_a_shard": held // shards,
        "fullest_over_mean": max(placed) * shards / sum(placed),
        "index_bytes_a_block": memory / held,
        "fill_blocks_per_cpu_s": sum(placed) / fill_s,
        "gc_pause_ms": pause * 1000 / shards,
        "lookup": lookups,
        "miss": misses,
        "publish_and_evict": publishes,
        "evicted_a_publish": evicted / len(fresh),
    }


def _keys(draw: random.Random, count: int) -> list[BlockKey]:
    raw = draw.randbytes(16 * count)
    return [raw[index : index + 16] for index in range(0, len(raw), 16)]


def _home(keys: Sequence[BlockKey], shards: int) -> int:
    return int.from_bytes(keys[0][:8], "little") % shards


def _top_up(store: Sequence[ShardIndex[_Reference]], draw: random.Random, size: int) -> None:
    """Fill shards up to their budgets, so that whatever comes next evicts."""
    for shard in store:
        before = shard.stats().evicted
        while shard.stats().evicted == before:
            shard.publish(_keys(draw, CHAIN), CHAIN, size, _Reference)


def _pause() -> float:
    start = time.thread_time()
    gc.collect()
    return time.thread_time() - start


def measure_routing(
    *,
    replicas: int = 1000,
    entries: int = 1_000_000,
    prompt_tokens: int = 1000,
    step_tokens: int = 16,
    decisions: int = 5000,
    seed: int = 0,
) -> dict[str, Any]:
    """Time the router's choice with a full memory of prefixes and replicas at work.

    Returns:
        ``Timing``s of choices for prompts whose prefix was served before, for prompts of which
        only the system prompt was, and for sessions; bytes of memory a remembered prefix.
    """
    draw = random.Random(seed)
    gc.collect()
    memory = psutil.Process().memory_info().rss
    policy = RoutingPolicy(RoutingConfig(step_tokens=step_tokens, max_prefixes=entries), seed=seed)
    names = [f"replica-{number}" for number in range(replicas)]
    policy.update(names)
    running: deque[str] = deque()

    def sent(choice: Choice) -> Choice:
        policy.started(choice.replica)
        policy.reported(choice.replica, draw.randrange(8, 17))
        running.append(choice.replica)
        if len(running) > 8 * replicas:
            policy.ended(running.popleft())
        return choice

    shared = SHARED * step_tokens
    systems = [_tokens(draw, shared) for _ in range(200)]

    def prompt(number: int, session: str = "") -> Request:
        # Made anew whenever it is wanted: prompts that lie about would be counted as memory.
        own = random.Random(number)
        tokens = own.choice(systems) + _tokens(own, prompt_tokens - shared)
        return Request(request_id=f"request {number}", prompt_token_ids=tokens, session_id=session)

    # Each prompt adds its own steps; the system prompts' are few.
    count = entries // ((prompt_tokens - shared) // step_tokens) + 1
    for number in range(count):
        sent(policy.choose(prompt(number)))
    memory = psutil.Process().memory_info().rss - memory
    reasons: dict[str, int] = {}

    def timed(requests: Iterable[Request]) -> Timing:
        def decide(request: Request) -> None:
            choices.append(policy.choose(request))

        def calls() -> Iterable[Callable[[], None]]:
            for request in requests:
                yield lambda r=request: decide(r)  # type: ignore[misc]
                choice = sent(choices.pop())
                reasons[choice.reason] = reasons.get(choice.reason, 0) + 1

        choices: list[Choice] = []
        return time_calls(calls())

    latest = range(count - decisions, count)
    again = timed(prompt(number) for number in draw.sample(latest, len(latest)))
    new = timed(prompt(number) for number in range(count, count + decisions))
    sessions = timed(
        prompt(number, f"session {draw.randrange(20_000)}")
        for number in range(count + decisions, count + 2 * decisions)
    )
    return {
        "replicas": replicas,
        "entries": entries,
        "prompt_tokens": prompt_tokens,
        "step_tokens": step_tokens,
        "bytes_an_entry": memory / entries,
        "known_prompt": again,
        "new_prompt": new,
        "session": sessions,
        "reasons": reasons,
    }


def _tokens(draw: random.Random, count: int) -> tuple[int, ...]:
    return tuple(draw.choices(range(49152), k=count))
