"""Moves keys and values between vLLM's cache and the store: the worker's half, without vLLM."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from fathom.kvstore.keys import BlockKey
from fathom.kvstore.store import BlocksGone, KVStore
from fathom.vllm.kv_keys import KVLayout
from fathom.vllm.kv_layout import Packing, Write, from_blocks, to_blocks
from fathom.vllm.kv_schedule import Load, Part, Save

_log = logging.getLogger(__name__)

MAX_QUEUED_BYTES = 512 << 20
"""Keys and values that may wait for the store; more are dropped: they cost hits, nothing else."""


@dataclass(frozen=True, slots=True)
class _Copied:
    """A save whose keys and values have been read.

    Attributes:
        layers: of each, whole blocks as they lay in the cache. skip: tokens before the first of
            the store's blocks ``first``.
    """

    save: Save
    layers: list[torch.Tensor]
    skip: int
    first: int

    @property
    def bytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)


class KVMover:
    """Fills cache blocks from a store, and stores what lies in them.

    Args:
        caches: of the layers in order, [num_blocks, num_kv_heads, block_size, 2 * head_dim].
        packing, write: of the backend. block_size: of the block ids, a multiple of the caches'.

    Attributes:
        loaded, stored, dropped: blocks of the deep chain, since the start.
    """

    def __init__(
        self,
        layout: KVLayout,
        caches: Sequence[torch.Tensor],
        packing: Packing,
        write: Write,
        block_size: int,
    ) -> None:
        self._layout = layout
        self._caches = list(caches)
        self._packing = packing
        self._write = write
        self._size = block_size
        self.loaded = self.stored = self.dropped = 0
        self._lost: dict[str, set[int]] = {}
        self._queued = 0
        self._lock = threading.Lock()  # of what is queued
        self._queue: queue.Queue[tuple[KVStore, _Copied] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="fathom-vllm-save", daemon=True)
        self._thread.start()

    def load(self, job: Load, store: KVStore | None) -> set[int]:
        """Fill the cache. Whatever goes wrong in the store is a miss.

        Returns:
            the block ids that were not filled: none, or all that the job names.
        """
        try:
            if store is None:
                raise BlocksGone("the store cannot be reached")
            self._fill(job, store)
        except BlocksGone:
            pass
        except Exception:
            _log.exception("the KV store fails; %d tokens are computed", job.stop - job.start)
        else:
            return set()
        first, last = job.start // self._size, -(-job.stop // self._size)
        lost = self._lost[job.request] = set(job.blocks[first:last])
        return lost

    def finished(self, requests: Iterable[str]) -> None:
        """These requests are over, and what their loads have lost does not matter any more."""
        for request in requests:
            self._lost.pop(request, None)

    def save(self, job: Save, store: KVStore | None) -> None:
        """Read keys and values now; they go to the store in their own time.

        Not those of a request whose load failed, or of one that shares a block with it, while it is
        under way: steps scheduled before vLLM knew of the failure compute from what is not there.
        """
        if store is None or any(
            request == job.request or not lost.isdisjoint(job.blocks)
            for request, lost in self._lost.items()
        ):
            return
        size, first = self._layout.block_size, min(job.first)
        start, stop = first * size, len(job.deep) * size
        begin, end = start // self._size, -(-stop // self._size)
        with self._lock:
            full = self._queued > MAX_QUEUED_BYTES
        if full:
            self.dropped += len(job.deep) - first
            return
        chosen = self._inner(job.blocks[begin:end])
        layers = [cache[chosen.to(cache.device)].cpu() for cache in self._caches]
        copied = _Copied(job, layers, start - begin * self._size, first)
        with self._lock:
            self._queued += copied.bytes
        self._queue.put((store, copied))

    def close(self) -> None:
        """End the thread when what is queued has been stored."""
        self._queue.put(None)
        self._thread.join(timeout=5)

    def _fill(self, job: Load, store: KVStore) -> None:
        size, k = self._layout.block_size, self._layout.num_shallow
        first = job.start // size
        positions = torch.arange(job.start, job.stop)
        ids = torch.tensor(job.blocks)[positions // self._size]
        slots = ids * self._size + positions % self._size
        skip, count = job.start - first * size, job.stop - job.start
        # Both parts are here before anything is written.
        parts = (
            self._fetch(job.shallow, store, first, k),
            self._fetch(job.deep, store, first, self._layout.num_layers - k),
        )
        heads = self._layout.layer_shape[0] // 2
        for cache, kv in zip(
            self._caches, (layer for part in parts for layer in part), strict=True
        ):
            rows = kv[skip : skip + count].to(device=cache.device, dtype=cache.dtype)
            self._write(cache, rows[:, :heads], rows[:, heads:], slots.to(cache.device))
        self.loaded += len(job.deep.keys) - first

    def _fetch(self, part: Part, store: KVStore, first: int, layers: int) -> torch.Tensor:
        """[layers, tokens, 2 * num_kv_heads, head_dim], of the part's blocks from ``first`` on."""
        hits = part.hits if part.hits is not None else store.lookup(part.keys)
        wanted = len(part.keys) - first
        if len(hits) < len(part.keys):
            raise BlocksGone(f"{len(hits)} of {len(part.keys)} blocks are left")
        blocks = list(hits.fetch(first))[:wanted]
        return from_blocks(blocks, layers, self._layout.layer_shape, self._layout.dtype)

    def _inner(self, blocks: Sequence[int]) -> torch.Tensor:
        """Blocks of the caches, which may be smaller than those that vLLM's scheduler knows."""
        ratio = self._size // self._caches[0].shape[2]
        ids = torch.tensor(blocks)
        return (ids[:, None] * ratio + torch.arange(ratio)).flatten()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            store, copied = item
            try:
                self._publish(store, copied)
            except Exception:
                _log.exception("the KV store fails; blocks are not shared")
            with self._lock:
                self._queued -= copied.bytes

    def _publish(self, store: KVStore, copied: _Copied) -> None:
        job, k, size = copied.save, self._layout.num_shallow, self._layout.block_size
        first_deep, first_shallow = job.first
        # The shallow chain first: a deep block alone is of less use.
        unused = self._layout.num_unused
        self._part(store, copied, job.shallow, first_shallow, copied.layers[:k], unused)
        self._part(store, copied, job.deep, first_deep, copied.layers[k:])
        self.stored += len(job.deep) - first_deep
        _log.debug("stored %d tokens of %s", (len(job.deep) - first_deep) * size, job.request)

    def _part(
        self,
        store: KVStore,
        copied: _Copied,
        keys: list[BlockKey],
        first: int,
        layers: Sequence[torch.Tensor],
        unused: int = 0,
    ) -> None:
        if first >= len(keys):
            return
        size = self._layout.block_size
        start = copied.skip + (first - copied.first) * size
        stop = start + (len(keys) - first) * size
        read = [self._packing.read(layer)[:, start:stop] for layer in layers]
        read += [torch.zeros_like(read[0])] * unused
        store.publish(keys, to_blocks(torch.stack(read), size))
