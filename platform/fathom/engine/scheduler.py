"""Who runs next: waiting and running queues, chunked prefill, admission, preemption."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from fathom.attention.paged_cache import PagedKVCache
from fathom.engine.prefixes import SharedPrefixes
from fathom.engine.sequence import Sequence
from fathom.kvstore.keys import KeyRoot, extend_keys


@dataclass(frozen=True, slots=True)
class ShallowWork:
    """Rows [seq.shallow_len, seq.shallow_len + num_rows) of a sequence for the next pass."""

    seq: Sequence
    num_rows: int

    @property
    def decides(self) -> bool:
        """Whether the last of these rows chooses a token."""
        seq = self.seq
        return not seq.waiting and seq.shallow_len + self.num_rows == len(seq.tokens)


class Scheduler:
    """Keeps every sequence in one of two queues and hands out rows and blocks.

    Args:
        shallow, deep: block accounting of the two stages.
        roots: key roots of the two stages for a cache salt, and for whether a request drafts.
        max_rows: most rows of a pass. max_sequences: most sequences that run at once.
        on_preempt: told of each sequence that will be recomputed.

    Attributes:
        shared: blocks of other replicas, or None. Set by who builds the engine.
        begins_plain: says of a sequence that begins whether it is ``plain``. Set by the engine.
    """

    def __init__(
        self,
        *,
        shallow: PagedKVCache,
        deep: PagedKVCache,
        roots: Callable[[str, bool], tuple[KeyRoot, KeyRoot]],
        max_rows: int,
        max_sequences: int,
        prefix_caching: bool,
        on_preempt: Callable[[Sequence], None],
    ) -> None:
        self.shallow_cache = shallow
        self._deep = deep
        self._roots = roots
        self.max_rows = max_rows
        self._max_sequences = max_sequences
        self._prefix_caching = prefix_caching
        self._on_preempt = on_preempt
        self.shared: SharedPrefixes | None = None
        self.begins_plain: Callable[[Sequence], bool] = lambda seq: False
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.prefix_queries = 0
        self.prefix_hits = 0

    def schedule(self) -> list[ShallowWork]:
        """Choose the rows of the next shallow pass, and make room for them.

        Running sequences come first, in order of admission, so that one that runs out of blocks
        takes them from a later one; then waiting sequences are admitted.
        """
        work: list[ShallowWork] = []
        busy: set[Sequence] = set()
        budget = self.max_rows
        for seq in list(self.running):
            if seq.in_flight or seq.rows_due == 0 or budget == 0 or seq not in self.running:
                continue
            rows = min(seq.rows_due, budget)
            if self._make_room(self.shallow_cache, seq, seq.shallow_len + rows, busy):
                work.append(ShallowWork(seq, rows))
                busy.add(seq)
                budget -= rows
        while self.waiting and budget and len(self.running) < self._max_sequences:
            seq = self.waiting[0]
            if not self._admit(seq):
                break
            self.waiting.popleft()
            self.running.append(seq)
            rows = 0 if seq.in_flight else min(seq.rows_due, budget)
            if rows and self.shallow_cache.grow(seq.seq_id, seq.shallow_len + rows):
                work.append(ShallowWork(seq, rows))
                budget -= rows
        return work

    def select_flush(self) -> list[tuple[Sequence, int]]:
        """Choose whose stacks go to the deep stage, and make room for them.

        Short stacks first: a long prompt is flushed in parts and must not hold up decoding.

        Returns:
            sequences with the number of their stack's rows that go now, from the bottom.
        """
        chosen: list[tuple[Sequence, int]] = []
        busy: set[Sequence] = set()
        budget = self.max_rows
        candidates = [seq for seq in self.running if seq.is_flushable]
        for seq in sorted(candidates, key=lambda s: s.shallow_len - s.deep_len):
            if seq not in self.running:  # preempted for one before it
                continue
            due = seq.shallow_len - seq.deep_len
            rows = min(due, budget)
            if rows < due:  # the rows with decisions stay together, for the last part
                rows = min(rows, due - len(seq.pending))
            if rows <= 0:
                continue
            if self._make_room(self._deep, seq, seq.deep_len + rows, busy):
                chosen.append((seq, rows))
                busy.add(seq)
                budget -= rows
        return chosen

    def start_running(self, seq: Sequence) -> bool:
        """Put a forked sequence straight into the running queue, if there is a place."""
        if len(self.running) >= self._max_sequences:
            return False
        self.running.append(seq)
        return True

    def remove(self, seq: Sequence, *, scrub: bool = False) -> None:
        """Take a sequence out of its queue and give its blocks back."""
        if seq in self.running:
            self.running.remove(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
        for cache in (self.shallow_cache, self._deep):
            if seq.seq_id in cache:
                cache.free(seq.seq_id, scrub=scrub)

    def publish(self, seq: Sequence) -> None:
        """Make the sequence's final full blocks findable by later requests."""
        if not self._prefix_caching:
            return
        size = self.shallow_cache.block_size
        final = min(seq.shallow_len, seq.deep_len, seq.confirmed) // size
        if seq.request.compute.copies_states:  # copied keys and values are nobody else's
            final = min(final, seq.num_prompt // size)
        if seq.keyed_for_drafts:  # a block has all that its key promises
            final = min(final, seq.exit_len // size)
        self._extend_keys(seq)
        if final > seq.published_blocks:
            self.shallow_cache.publish(seq.seq_id, seq.shallow_keys[:final])
            self._deep.publish(seq.seq_id, seq.deep_keys[:final])
            seq.published_blocks = final
        if self.shared is not None:
            self.shared.publish(seq, final)

    def preempt(self, seq: Sequence) -> None:
        """Take a running sequence's blocks away; it waits, first in line, to be recomputed."""
        self.running.remove(seq)
        self.shallow_cache.free(seq.seq_id, scrub=True)
        self._deep.free(seq.seq_id, scrub=True)
        seq.forget_kv()
        self.waiting.appendleft(seq)
        self._on_preempt(seq)

    def rebuild_deep(self, seq: Sequence) -> None:
        """Open a running sequence in a deep stage that is empty.

        It loads what the KV store has; what is left of the stack goes there as states.
        """
        self._deep.open(seq.seq_id)
        seq.deep_len = seq.deep_ahead = seq.published_blocks = 0
        if self.shared is not None:
            self._extend_keys(seq)
            limit = min(self._final_rows(seq), seq.shallow_len) // self._deep.block_size
            self.shared.begin_deep(seq, min(limit, len(seq.deep_keys)))

    def _make_room(
        self,
        cache: PagedKVCache,
        seq: Sequence,
        length: int,
        busy: set[Sequence],
    ) -> bool:
        """Grow a sequence in one cache, preempting later sequences if need be.

        Args:
            busy: sequences that have work in the pass that is being put together.

        Returns:
            False if it must wait (or had to be preempted itself).
        """
        while not cache.grow(seq.seq_id, length):
            idle = [s for s in self.running if not s.in_flight and s not in busy]
            victim = idle[-1]
            if victim is not seq:
                self.preempt(victim)
                continue
            # With others at work, blocks come back soon: wait for them, keep what is computed.
            if len(idle) == len(self.running):
                self.preempt(seq)
            return False
        return True

    def _admit(self, seq: Sequence) -> bool:
        """Open a waiting sequence in both caches if its tokens fit now."""
        if not seq.shallow_keys:  # else it has begun before
            seq.plain = self.begins_plain(seq)
        limit, hits = self._reusable_blocks(seq)
        shallow_keys, deep_keys = seq.shallow_keys[:hits], seq.deep_keys[:hits]
        # One more block each, so that a sequence is not admitted only to be preempted at once.
        due = len(seq.tokens) + 1
        for cache, keys in ((self.shallow_cache, shallow_keys), (self._deep, deep_keys)):
            # Cached blocks without an owner count as available until they are shared.
            needed = cache.blocks_for(due) - len(keys)
            available = cache.num_available_blocks - cache.num_unowned(keys)
            spare = 1 if self.running else 0
            if needed + spare > available:
                return False
        self.shallow_cache.open(seq.seq_id, shallow_keys)
        self._deep.open(seq.seq_id, deep_keys)
        seq.restart(len(shallow_keys) * self.shallow_cache.block_size)
        if self._prefix_caching:
            self.prefix_queries += len(seq.tokens)
            self.prefix_hits += seq.shallow_len
        if not seq.compute.preemptions:
            seq.cached_tokens = min(seq.shallow_len, seq.num_prompt)
        seq.shared_blocks = hits
        if self.shared is not None:
            self.shared.begin(seq, hits, limit)
        return True

    def _reusable_blocks(self, seq: Sequence) -> tuple[int, int]:
        """Leading blocks that may come from elsewhere, and those of them that both stages have.

        Blocks of one stage alone are of no use here: without the deep KV the exit states of those
        rows would be missing, and without the shallow KV nothing can be drafted.
        """
        if not self._prefix_caching:
            return 0, 0
        self._extend_keys(seq)
        limit = self._final_rows(seq) // self.shallow_cache.block_size
        shallow, deep = seq.shallow_keys[:limit], seq.deep_keys[:limit]
        hits = min(self.shallow_cache.match(shallow), self._deep.match(deep))
        return min(limit, len(shallow)), hits

    def _final_rows(self, seq: Sequence) -> int:
        """Leading rows that need not run here: nothing is decided or scored at them."""
        # The last token always runs, and so does every row that still has to be judged.
        limit = min([len(seq.tokens) - 1, *(d.position for d in seq.pending)])
        # Cached rows have no logits, so they end where the prompt still has to be scored.
        if seq.scores is not None and not seq.scores.complete:
            limit = min(limit, seq.scores.num_rows)
        if seq.copied:  # a row that was copied stays a copy, also when it is recomputed
            limit = min(limit, seq.copied[0])
        return limit

    def _extend_keys(self, seq: Sequence) -> None:
        # Final tokens only: a draft that is cut would leave its key behind.
        request = seq.request
        shallow_root, deep_root = self._roots(request.cache_salt, seq.keyed_for_drafts)
        final = seq.tokens[: seq.confirmed]
        extend_keys(seq.shallow_keys, shallow_root, final, self.shallow_cache.block_size)
        extend_keys(seq.deep_keys, deep_root, final, self._deep.block_size)
