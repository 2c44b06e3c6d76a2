"""Two engines in processes of their own over one KV store, asked without a router."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from deployments.cluster import start_ray
from fathom.bench.prefix import FirstToken
from fathom.config import EngineConfig
from fathom.kvstore.ray_store import RayKVStore, start_store, stop_store

BUDGET_BYTES = 1 << 30
SHARDS = 2
_START_S = 300.0
_ASK_S = 300.0


class _Engine:
    """A fused engine as an actor."""

    def __init__(self, config: EngineConfig, shards: Sequence[Any]) -> None:
        from fathom.engine.build import build_engine

        self._engine = build_engine(config, store=RayKVStore(shards))

    def vocab_size(self) -> int:
        """Of the model."""
        return self._engine.info.vocab_size

    def first_token(self, prompt: Sequence[int]) -> FirstToken:
        """Run a prompt alone."""
        from fathom.bench.prefix import first_token

        return first_token(self._engine, prompt)


class Asked:
    """One of the two; see ``fathom.bench.prefix.Asked``."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def first_token(self, prompt: Sequence[int]) -> FirstToken:
        """Run a prompt alone on that engine."""
        found: FirstToken = ray.get(self._actor.first_token.remote(list(prompt)), timeout=_ASK_S)
        return found


@dataclass(frozen=True, slots=True)
class Pair:
    """The two replicas, their store, and the model's vocabulary."""

    replicas: tuple[Asked, Asked]
    store: RayKVStore
    vocab_size: int

    def blocks_taken(self) -> int:
        """Blocks that the store has ever listed."""
        stats = self.store.stats()
        return stats.blocks + stats.evicted


@contextmanager
def engine_pair(config: EngineConfig, cpus: float = 1.0) -> Iterator[Pair]:
    """Start the pair on Ray, on one that is started here if this process has none; end it all.

    Args:
        cpus: of each; ``config.threads`` should agree.
    """
    owns_ray = not ray.is_initialized()
    if owns_ray:
        start_ray(2)
    name = f"bench-{secrets.token_hex(4)}"
    shards = start_store(name, shards=SHARDS, budget_bytes=BUDGET_BYTES)
    actors: list[Any] = []
    try:
        kind: Any = ray.remote(_Engine)
        actors += [kind.options(num_cpus=cpus).remote(config, shards) for _ in range(2)]
        sizes = ray.get([actor.vocab_size.remote() for actor in actors], timeout=_START_S)
        yield Pair((Asked(actors[0]), Asked(actors[1])), RayKVStore(shards), sizes[0])
    finally:
        for actor in actors:
            ray.kill(actor)
        stop_store(name, shards=SHARDS)
        if owns_ray:
            ray.shutdown()
