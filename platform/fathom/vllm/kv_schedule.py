"""What of which request is loaded and stored next: the scheduler's half, without vLLM."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fathom.kvstore.keys import BlockKey
from fathom.kvstore.store import Hits, KVStore
from fathom.vllm.kv_keys import Chains, KVLayout

_log = logging.getLogger(__name__)

_BLOCKS_AT_ONCE = 8
"""Blocks of a growing answer that are stored together, as ``fathom.engine.prefixes`` does."""


@dataclass
class Part:
    """Blocks of one chain.

    Attributes:
        keys: from the chain's first block on, up to the last that is meant.
        hits: what the lookup found; in the process that asked only.
    """

    keys: list[BlockKey]
    hits: Hits | None = None

    def __getstate__(self) -> dict[str, Any]:
        """References to blocks do not travel to another process, which asks for itself."""
        return {"keys": self.keys, "hits": None}


@dataclass
class Load:
    """Fill positions [start, stop) of a request's cache. blocks: vLLM's, from position 0 on."""

    request: str
    blocks: list[int]
    start: int
    stop: int
    deep: Part
    shallow: Part


@dataclass
class Save:
    """Store the blocks [first, keys) of each chain of a request. blocks: as in ``Load``.

    Attributes:
        first: number of the first block that is new; of the deep and the shallow chain.
        last: the request is over, and vLLM waits to hear that its blocks have been read.
    """

    request: str
    blocks: list[int]
    deep: list[BlockKey]
    shallow: list[BlockKey]
    first: tuple[int, int]
    last: bool = False


@dataclass
class Jobs:
    """Of one step."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)


@dataclass
class _Tracked:
    """A request.

    Attributes:
        tokens: grows as the request does. keys: of its blocks, a list for each chain.
        computed: leading tokens that vLLM has itself. found: hits in each chain since it was last
            allocated blocks; usable: blocks that are there whole.
        saved: blocks that are in the store, (deep, shallow).
    """

    tokens: Sequence[int]
    salt: str
    num_prompt: int
    keys: Chains
    computed: int = 0
    found: Chains | None = None
    usable: int = 0
    blocks: list[int] = field(default_factory=list)
    saved: tuple[int, int] = (0, 0)


_NOTHING = Chains(None, None, None)


class KVSchedule:
    """Follows requests through vLLM's scheduler.

    Args:
        store: the store, or None while it cannot be reached.
        saves: whether blocks are stored at all. block_size: vLLM's.
    """

    def __init__(
        self, layout: KVLayout, store: Callable[[], KVStore | None], *, saves: bool, block_size: int
    ) -> None:
        self._layout = layout
        self._store = store
        self._saves = saves
        self._size = block_size
        self._requests: dict[str, _Tracked] = {}
        self._jobs = Jobs()

    def match(
        self, request: str, tokens: Sequence[int], num_prompt: int, salt: str, computed: int
    ) -> int:
        """Tokens that can be loaded beyond the ``computed`` leading ones.

        The last token is left to compute. Asks the store once until blocks are allocated.

        Args:
            tokens: of the request so far; is read again as it grows.
        """
        tracked = self._requests.get(request)
        if tracked is None:
            tracked = self._requests[request] = _Tracked(
                tokens, salt, num_prompt, self._layout.no_keys()
            )
        tracked.computed = computed
        if tracked.found is None:
            limit = (len(tokens) - 1) // self._layout.block_size
            try:
                tracked.found, tracked.usable = self._lookup(tracked, limit)
            except Exception:  # vLLM's engine would end with it, and all requests
                _log.exception("the KV store fails; prefixes are computed")
                tracked.found, tracked.usable = _NOTHING, 0
        return max(0, tracked.usable * self._layout.block_size - computed)

    def allocated(self, request: str, blocks: Sequence[int], external: int) -> None:
        """Blocks were found for a request; ``external`` tokens of it are to be loaded."""
        tracked = self._requests.get(request)
        if tracked is None:
            return
        tracked.blocks = list(blocks)
        found, tracked.found = tracked.found, None  # after a preemption the store is asked again
        if found is None:
            return
        if external > 0:
            stop = tracked.computed + external
            count = -(-stop // self._layout.block_size)
            keys = tracked.keys
            shallow = Part(keys.plain[:count], found.plain)
            if len(found.drafting or ()) > len(found.plain or ()):
                shallow = Part(keys.drafting[:count], found.drafting)
            deep = Part(keys.deep[:count], found.deep)
            self._jobs.loads.append(
                Load(request, tracked.blocks, tracked.computed, stop, deep, shallow)
            )
        has = (len(found.deep or ()), len(found.plain or ()))
        tracked.saved = (max(tracked.saved[0], has[0]), max(tracked.saved[1], has[1]))

    def computed(self, request: str, new_blocks: Sequence[int] | None, computed: int) -> None:
        """After the coming step ``computed`` leading tokens of a request have keys and values."""
        tracked = self._requests.get(request)
        if tracked is None:
            return
        tracked.blocks += new_blocks or ()
        self._save(request, tracked, min(computed, len(tracked.tokens)), last=False)

    def finished(self, request: str, computed: int) -> bool:
        """A request is over; whether its blocks are still to be read."""
        tracked = self._requests.pop(request, None)
        if tracked is None or not tracked.blocks:
            return False
        # The last token has been chosen, not run.
        return self._save(request, tracked, min(computed, len(tracked.tokens) - 1), last=True)

    def take(self) -> Jobs:
        """What there is to do in the coming step."""
        jobs, self._jobs = self._jobs, Jobs()
        return jobs

    def _lookup(self, tracked: _Tracked, limit: int) -> tuple[Chains, int]:
        """Hits in each chain among the first ``limit`` blocks, and how many are there whole."""
        store = self._store()
        if store is None or not limit:
            return _NOTHING, 0
        self._extend(tracked, limit)
        keys = [chain[:limit] for chain in tracked.keys]
        deep = store.lookup(keys[0])
        if not len(deep):
            return Chains(deep, None, None), 0
        plain = store.lookup(keys[1])
        drafting: Hits | None = None
        if len(plain) < len(deep) and tracked.keys.drafting is not tracked.keys.plain:
            drafting = store.lookup(keys[2])
        usable = min(len(deep), max(len(plain), len(drafting or ())))
        return Chains(deep, plain, drafting), usable

    def _extend(self, tracked: _Tracked, blocks: int) -> None:
        if len(tracked.keys.deep) < blocks:
            tokens = tracked.tokens[: blocks * self._layout.block_size]
            self._layout.extend(tracked.keys, tokens, tracked.salt)

    def _save(self, request: str, tracked: _Tracked, stop: int, *, last: bool) -> bool:
        size = self._layout.block_size
        full, first = stop // size, tracked.saved
        due = full - min(first)
        of_prompt = min(first) < tracked.num_prompt // size
        if not self._saves or due <= 0 or not (last or of_prompt or due >= _BLOCKS_AT_ONCE):
            return False
        if self._store() is None or full * size > len(tracked.blocks) * self._size:
            return False
        self._extend(tracked, full)
        deep, plain = tracked.keys.deep[:full], tracked.keys.plain[:full]
        self._jobs.saves.append(Save(request, list(tracked.blocks), deep, plain, first, last))
        tracked.saved = (max(full, first[0]), max(full, first[1]))
        return True
