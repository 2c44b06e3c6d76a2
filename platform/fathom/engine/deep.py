"""The deep stage behind its one seam: the engine cannot tell a local one from a remote one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch

from fathom.attention.backend import SequenceRows
from fathom.attention.paged_cache import PagedKVCache
from fathom.engine.stage import Stage


class DeepLost(ConnectionError):
    """The deep stage is gone, and with it the deep keys and values of every sequence."""


@dataclass(frozen=True, slots=True)
class FlushItem:
    """One sequence's stack in a flush.

    Attributes:
        blocks: of the deep KV pool, those of all positions up to the last row's.
        start: position of the first row. Everything that the blocks hold from there on was cut by
            the engine and is overwritten.
        hidden: [rows, d] exit-layer hidden states.
        num_outputs: logits are wanted for this many of the last rows that layers run over.
        copied: rows of ``hidden``, ascending, that no layer runs over: their keys and values are
            projected from it (CALM).
    """

    seq_id: int
    blocks: Sequence[int]
    start: int
    hidden: torch.Tensor
    num_outputs: int
    copied: Sequence[int] = ()

    def parts(self, *, copied: bool) -> tuple[list[SequenceRows], list[torch.Tensor]]:
        """Runs of rows that are copied, or that layers run over, with their states."""
        wanted = set(self.copied)
        rows: list[SequenceRows] = []
        states: list[torch.Tensor] = []
        first = 0
        for is_copied, run in itertools.groupby(range(len(self.hidden)), wanted.__contains__):
            stop = first + len(list(run))
            if is_copied == copied:
                rows.append(SequenceRows(self.blocks, self.start + first, stop - first))
                states.append(self.hidden[first:stop])
            first = stop
        return rows, states


@dataclass(frozen=True, slots=True)
class FlushResult:
    """The deep stage's answer.

    Attributes:
        logits: [sum of num_outputs, vocabulary], item after item, in the model's dtype: greedy
            rows need no more, and a copy of all of them in float32 costs as much as a layer.
    """

    logits: torch.Tensor


class DeepStage(Protocol):
    """Layers [k, L) and the LM head, with the deep KV of the sequences it has open.

    ``flush`` may be answered later; everything else is bookkeeping and returns at once. The
    engine has at most one flush of a sequence away, and neither cuts nor closes a sequence while
    its flush is away.
    """

    @property
    def cache(self) -> PagedKVCache:
        """Block accounting: what is open, how long, what is free."""
        ...

    @property
    def may_be_lost(self) -> bool:
        """Whether it can fail on its own, so that what it must know has to be kept here."""
        ...

    def flush(self, items: Sequence[FlushItem]) -> Future[FlushResult]:
        """Run stacks of many sequences as one ragged batch.

        ``DeepLost`` in the answer says that every sequence's deep keys and values are gone.

        Room for every row must have been made in ``cache`` before.
        """
        ...

    def reopen(self) -> None:
        """Start afresh after ``DeepLost``, here or elsewhere, with an empty ``cache``.

        No flush is away; sequences that were open are so no more.

        Raises:
            DeepLost: if there is nobody to go to.
        """
        ...

    def close(self) -> None:
        """Release what the stage holds; flushes that are away fail."""
        ...


class LocalDeepStage:
    """The deep stage in this process: its answer is there when ``flush`` returns."""

    def __init__(self, stage: Stage, cache: PagedKVCache) -> None:
        self._stage = stage
        self._cache = cache

    @property
    def cache(self) -> PagedKVCache:
        """Block tables over the stage's own pool."""
        return self._cache

    @property
    def may_be_lost(self) -> bool:
        """It ends with this process."""
        return False

    def flush(self, items: Sequence[FlushItem]) -> Future[FlushResult]:
        """See ``DeepStage.flush``."""
        answer: Future[FlushResult] = Future()
        answer.set_result(FlushResult(run_flush(self._stage, items)))
        return answer

    def reopen(self) -> None:
        """Nothing of it is ever lost."""

    def close(self) -> None:
        """Nothing to release."""


def run_flush(stage: Stage, items: Sequence[FlushItem]) -> torch.Tensor:
    """Run the items' rows through a stage; the logits of a ``FlushResult``."""
    copied_rows: list[SequenceRows] = []
    copied_states: list[torch.Tensor] = []
    rows: list[SequenceRows] = []
    states: list[torch.Tensor] = []
    wanted: list[int] = []
    row = 0
    for item in items:
        if item.copied:
            parts = item.parts(copied=True)
            copied_rows += parts[0]
            copied_states += parts[1]
        parts = item.parts(copied=False)
        rows += parts[0]
        states += parts[1]
        row += len(item.hidden) - len(item.copied)
        wanted += range(row - item.num_outputs, row)
    if copied_rows:
        stage.copy_states(copied_rows, torch.cat(copied_states))
    if not rows:
        return items[0].hidden.new_empty(0, stage.decoder.config.vocab_size)
    hidden = states[0] if len(states) == 1 else torch.cat(states)
    out = stage.run(stage.plan(rows), hidden)
    if len(wanted) < len(out):
        out = out[torch.tensor(wanted, dtype=torch.int64, device=out.device)]
    return stage.decoder.logits(out)
