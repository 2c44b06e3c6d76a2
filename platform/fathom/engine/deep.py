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
from fathom.engine.shared import SharedBlocks
from fathom.engine.stage import Stage
from fathom.kvstore.keys import BlockKey


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
        num_outputs: an answer is wanted for this many of the last rows that layers run over.
        copied: rows of ``hidden``, ascending, that no layer runs over: their keys and values are
            projected from it (CALM).
        logits: whether whole rows of logits are wanted, beside the best token of each: a
            vocabulary of them is by far the largest thing that can travel back.
        drafts: tokens whose logprob is wanted, one an output or none at all; -1 asks for none.
    """

    seq_id: int
    blocks: Sequence[int]
    start: int
    hidden: torch.Tensor
    num_outputs: int
    copied: Sequence[int] = ()
    logits: bool = True
    drafts: Sequence[int] = ()

    @property
    def num_logits(self) -> int:
        """Rows of logits in the answer."""
        return self.num_outputs if self.logits else 0

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
    """The deep stage's answer, item after item.

    Attributes:
        best, argmax: [sum of num_outputs] largest logit of each row and its token. A NaN counts as
            the largest, so ``best`` is finite iff the row holds neither NaN nor +inf.
        logprobs: [sum of num_outputs] natural logs of the drafts' probabilities at temperature 1,
            NaN where none was asked for.
        logits: [sum of num_logits, vocabulary] in the model's dtype: greedy rows need no more, and
            a copy of all of them in float32 costs as much as a layer.
    """

    best: Sequence[float]
    argmax: Sequence[int]
    logprobs: Sequence[float]
    logits: torch.Tensor

    def part(self, first: int, outputs: int, first_logits: int, logits: int) -> FlushResult:
        """The answer to some of the items: ``outputs`` rows, and ``logits`` rows of logits."""
        own = slice(first, first + outputs)
        rows = self.logits[first_logits : first_logits + logits]
        return FlushResult(self.best[own], self.argmax[own], self.logprobs[own], rows)


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

    def load(self, blocks: Sequence[int], keys: Sequence[BlockKey]) -> Future[int]:
        """Fill blocks from the KV store.

        Args:
            blocks: of the pool, in order; nobody looks at them until the answer is there.
            keys: of one chain from its first block on; the last ``len(blocks)`` are wanted.

        Returns:
            how many of the blocks, from the first on, hold now what their keys say. Never fails:
            what cannot be had is not counted.
        """
        ...

    def publish(self, blocks: Sequence[int], keys: Sequence[BlockKey]) -> None:
        """Offer blocks to the KV store, as they are after everything that was flushed before.

        Args:
            keys: of one chain from its first block on; ``blocks`` are those of the last ones.
        """
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
    """The deep stage in this process: its answer is there when ``flush`` returns.

    Args:
        shared: what the stage shares with other replicas, if anything.
    """

    def __init__(
        self, stage: Stage, cache: PagedKVCache, shared: SharedBlocks | None = None
    ) -> None:
        self._stage = stage
        self._cache = cache
        self._shared = shared

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
        answer.set_result(run_flush(self._stage, items))
        return answer

    def load(self, blocks: Sequence[int], keys: Sequence[BlockKey]) -> Future[int]:
        """See ``DeepStage.load``."""
        if self._shared is not None:
            return self._shared.load(blocks, keys)
        nothing: Future[int] = Future()
        nothing.set_result(0)
        return nothing

    def publish(self, blocks: Sequence[int], keys: Sequence[BlockKey]) -> None:
        """See ``DeepStage.publish``."""
        if self._shared is not None:
            self._shared.publish(blocks, keys)

    def reopen(self) -> None:
        """Nothing of it is ever lost."""

    def close(self) -> None:
        """Let nothing more be loaded or published."""
        if self._shared is not None:
            self._shared.close()


def run_flush(stage: Stage, items: Sequence[FlushItem]) -> FlushResult:
    """Run the items' rows through a stage, and read what is wanted off the logits."""
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
    if rows:
        out = stage.run(stage.plan(rows), states[0] if len(states) == 1 else torch.cat(states))
    if not wanted:  # a part of a long prompt
        decoder = stage.decoder
        empty = torch.empty(0, decoder.config.vocab_size, dtype=decoder.dtype)
        return FlushResult([], [], [], empty)
    if len(wanted) < len(out):
        out = out[torch.tensor(wanted, dtype=torch.int64, device=out.device)]
    return _read(stage.decoder.logits(out), items)


def _read(logits: torch.Tensor, items: Sequence[FlushItem]) -> FlushResult:
    """Reduce [outputs, vocabulary] to what the items want of it."""
    # One reduction serves all greedy choices, and shows what is not finite.
    best, argmax = (values.tolist() for values in logits.max(dim=-1))
    logprobs = [float("nan")] * len(argmax)
    drafted: list[tuple[int, int]] = []
    kept: list[int] = []
    row = 0
    for item in items:
        drafted += [(row + i, token) for i, token in enumerate(item.drafts) if token >= 0]
        if item.logits:
            kept += range(row, row + item.num_outputs)
        row += item.num_outputs
    if drafted:
        rows, tokens = zip(*drafted, strict=True)
        scores = torch.log_softmax(logits[list(rows)].float(), dim=-1)
        for index, (at, token) in enumerate(zip(rows, tokens, strict=True)):
            logprobs[at] = float(scores[index, token])
    if len(kept) < len(argmax):
        logits = logits[kept]
    return FlushResult(best, argmax, logprobs, logits)
