"""Prefixes that other replicas have computed: fetched from the KV store as sequences start."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

import torch

from fathom.attention.paged_cache import PagedKVCache
from fathom.engine.deep import DeepStage
from fathom.engine.sequence import Sequence
from fathom.engine.shared import LoadedStates, SharedBlocks
from fathom.engine.states import ExitStates

_BLOCKS_AT_ONCE = 8
"""Blocks of a growing answer that are published together: a call costs about a millisecond."""


@dataclass(frozen=True, slots=True)
class _Load:
    """A sequence whose blocks are on their way.

    Attributes:
        first: positions that both stages had before. shallow: blocks that came after them, None
            where only the deep stage loads. states: of the rows of those blocks.
    """

    seq: Sequence
    first: int
    deep: Future[int]
    shallow: Future[int] | None = None
    states: LoadedStates | None = None


class SharedPrefixes:
    """Loads the blocks of a starting sequence into both stages, and publishes final ones.

    A sequence whose blocks are on their way counts as in flight: nobody schedules, cuts or
    preempts it, and others go on.

    Args:
        shared: of the shallow stage, exit states beside its blocks.
        cache: of the shallow stage. deep: loads and publishes its own blocks.
        width, dtype: of an exit state.

    Attributes:
        tokens: positions that came from the store.
    """

    def __init__(
        self,
        shared: SharedBlocks,
        cache: PagedKVCache,
        deep: DeepStage,
        *,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self._shared = shared
        self._cache = cache
        self._deep = deep
        self._no_states = torch.empty(0, width, dtype=dtype, device=device)
        self._away: list[_Load] = []
        self.tokens = 0

    @property
    def next_answers(self) -> list[Future[int]]:
        """What is awaited."""
        futures = (f for load in self._away for f in (load.shallow, load.deep) if f is not None)
        return [future for future in futures if not future.done()]

    def begin(self, seq: Sequence, first: int, last: int) -> None:
        """Ask for the blocks [first, last) of a sequence that has the earlier ones.

        Without room for them nothing happens: they are computed as rows come up.
        """
        size = self._cache.block_size
        caches = (self._cache, self._deep.cache)
        if first >= last or not all(_fits(c, seq.seq_id, last * size) for c in caches):
            return
        for cache in caches:
            cache.grow(seq.seq_id, last * size)
        blocks, deep_blocks = (c.block_table(seq.seq_id)[first:last] for c in caches)
        rows = self._no_states.new_empty((last - first) * size, self._no_states.shape[1])
        states = LoadedStates(rows)
        shallow = self._shared.load(blocks, seq.shallow_keys[:last], states)
        deep = self._deep.load(deep_blocks, seq.deep_keys[:last])
        seq.in_flight = True
        self._away.append(_Load(seq, first * size, deep, shallow, states))

    def begin_deep(self, seq: Sequence, last: int) -> None:
        """Ask for the blocks [0, last) of a sequence that a deep stage has just opened."""
        cache = self._deep.cache
        if not last or not _fits(cache, seq.seq_id, last * cache.block_size):
            return
        cache.grow(seq.seq_id, last * cache.block_size)
        deep = self._deep.load(cache.block_table(seq.seq_id), seq.deep_keys[:last])
        seq.in_flight = True
        self._away.append(_Load(seq, 0, deep))

    def land(self, *, block: bool = False) -> list[Sequence]:
        """Take in what has come; returns the sequences that can go on.

        Args:
            block: wait for all that is away.
        """
        landed: list[Sequence] = []
        for load in list(self._away):
            done = load.deep.done() and (load.shallow is None or load.shallow.done())
            if block or done:
                self._away.remove(load)
                self._take_in(load)
                landed.append(load.seq)
        return landed

    def publish(self, seq: Sequence, final: int) -> None:
        """Offer a sequence's blocks up to number ``final`` that others do not have yet.

        A prompt's go at once; an answer's a few at a time, and the rest when it has ended.
        """
        size, start = self._cache.block_size, seq.shared_blocks
        ended = seq.finish_reason is not None
        of_prompt = start < seq.num_prompt // size
        if final <= start or not (ended or of_prompt or final - start >= _BLOCKS_AT_ONCE):
            return
        if start * size < seq.states.start:  # from the pool of this replica: published before
            start = min(final, -(-seq.states.start // size))
        if start < final:
            self._shared.publish(
                self._cache.block_table(seq.seq_id)[start:final],
                seq.shallow_keys[:final],
                seq.states.rows(start * size, final * size),
            )
            start = max(start, seq.deep_ahead // size)  # the store had those before it
            deep_blocks = self._deep.cache.block_table(seq.seq_id)[start:final]
            if deep_blocks:
                self._deep.publish(deep_blocks, seq.deep_keys[:final])
        seq.shared_blocks = final

    def close(self) -> None:
        """Ask for nothing more."""
        self._shared.close()

    def _take_in(self, load: _Load) -> None:
        seq, size = load.seq, self._cache.block_size
        seq.in_flight = False
        deep = load.first + load.deep.result() * size
        if load.shallow is not None:
            assert load.states is not None
            blocks, found = load.shallow.result(), load.deep.result()
            # Without its exit states a row is of use where its deep keys and values are there.
            lacking = [index for index in load.states.missing if index < blocks]
            blocks = min([blocks, *(index for index in lacking if index >= found)])
            known = max((index + 1 for index in lacking if index < blocks), default=0) * size
            count = blocks * size
            seq.shallow_len = seq.exit_len = load.first + count
            seq.never_drafts = seq.plain and seq.exit_len > 0
            seq.states = ExitStates(load.first + known)
            if count > known:
                seq.states.append(load.states.rows[known:count])
            self._cache.truncate(seq.seq_id, seq.shallow_len)
            seq.shared_blocks = seq.shallow_len // size
            if not seq.compute.preemptions:
                seq.cached_tokens = min(seq.shallow_len, seq.num_prompt)
            self.tokens += count
        # Without its deep blocks a row is simply on the stack: its exit state is here. Without its
        # shallow ones it runs up to the exit, and its deep keys and values wait for it.
        seq.deep_len, seq.deep_ahead = min(deep, seq.shallow_len), deep
        self._deep.cache.truncate(seq.seq_id, deep)


def _fits(cache: PagedKVCache, seq_id: int, length: int) -> bool:
    return cache.blocks_needed(seq_id, length) <= cache.num_available_blocks
