"""A stage's blocks in the KV store: loaded into its pool, published from it, never waited for."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from fathom.attention.pool import KVPool
from fathom.kvstore.keys import BlockKey
from fathom.kvstore.store import Block, BlocksGone, KVStore


@dataclass(slots=True)
class LoadedStates:
    """Exit states of the rows of blocks that are loaded.

    Attributes:
        rows: [blocks * block_size, d]. missing: numbers of the blocks that came without.
    """

    rows: torch.Tensor
    missing: list[int] = field(default_factory=list)


_log = logging.getLogger(__name__)

_MAX_QUEUED = 64
"""Publications that may wait for the store; more are dropped: they cost hits, nothing else."""


class SharedBlocks:
    """Moves blocks between a stage's pool and a store, on threads of its own.

    A block in the store is the pool's block, [layers, 2 * num_kv_heads, block_size, head_dim] in
    the pool's dtype, then, for a shallow stage, the exit-layer hidden states of its rows,
    [block_size, d]: from them a deep stage that lacks a block can rebuild its own. A block that
    vLLM computed has none (``fathom.vllm.kv_keys``).

    Args:
        store: is asked from several threads.
        states_width: d where exit states lie beside the blocks, else 0.

    Attributes:
        loaded, published, dropped: blocks, since the start.
    """

    def __init__(self, store: KVStore, pool: KVPool, states_width: int = 0) -> None:
        self._store = store
        self._pool = pool
        self._width = states_width
        self.loaded = self.published = self.dropped = 0
        self._loaders = ThreadPoolExecutor(2, thread_name_prefix="fathom-load")
        self._queue: queue.Queue[tuple[list[BlockKey], list[Block]] | None] = queue.Queue(
            _MAX_QUEUED
        )
        self._publisher = threading.Thread(target=self._publish, name="fathom-publish", daemon=True)
        self._publisher.start()

    def load(
        self, blocks: Sequence[int], keys: Sequence[BlockKey], states: LoadedStates | None = None
    ) -> Future[int]:
        """Fill blocks of the pool from the store; see ``DeepStage.load``.

        Args:
            states: filled as far as the answer says.
        """
        return self._loaders.submit(self._load, list(blocks), list(keys), states)

    def publish(
        self, blocks: Sequence[int], keys: Sequence[BlockKey], states: torch.Tensor | None = None
    ) -> None:
        """Offer blocks as they are now; see ``DeepStage.publish``.

        Args:
            states: [len(blocks) * block_size, d] where they lie beside the blocks.
        """
        size = self._pool.block_size
        contents: list[Block] = []
        for index, block in enumerate(blocks):
            parts = [self._pool.read_block(block)]
            if self._width:
                assert states is not None
                parts.append(_bytes_of(states[index * size : (index + 1) * size]))
            contents.append(np.concatenate(parts) if self._width else parts[0])
        try:
            self._queue.put_nowait((list(keys), contents))
        except queue.Full:
            self.dropped += len(contents)

    def close(self) -> None:
        """End the threads; what is queued is dropped."""
        self._loaders.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        self._queue.put(None)

    def _load(self, blocks: list[int], keys: list[BlockKey], states: LoadedStates | None) -> int:
        """How many blocks were filled. Whatever goes wrong in the store is a miss."""
        try:
            return self._fill(blocks, keys, states)
        except BlocksGone:
            return 0
        except Exception:
            _log.exception("the KV store fails; blocks are computed")
            return 0

    def _fill(self, blocks: list[int], keys: list[BlockKey], states: LoadedStates | None) -> int:
        first = len(keys) - len(blocks)
        hits = self._store.lookup(keys)
        if len(hits) <= first:
            return 0
        found = hits.fetch(first)
        size, split = self._pool.block_size, self._pool.bytes_a_block
        for index, content in enumerate(found):
            self._pool.write_block(blocks[index], content[:split])
            if states is not None and len(content) == split:
                states.missing.append(index)
            elif states is not None:
                own = states.rows[index * size : (index + 1) * size]
                own.copy_(_tensor_of(content[split:], own))
        self.loaded += len(found)
        return len(found)

    def _publish(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                self._store.publish(*job)
            except Exception:
                _log.exception("the KV store fails; blocks are not shared")
            else:
                self.published += len(job[1])


def _bytes_of(states: torch.Tensor) -> Block:
    return states.contiguous().cpu().view(torch.uint8).numpy().reshape(-1)


def _tensor_of(content: Block, like: torch.Tensor) -> torch.Tensor:
    """A copy, since what a store gives out is read-only."""
    return torch.from_numpy(content.copy()).view(like.dtype).view(like.shape)
