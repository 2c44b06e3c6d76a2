"""Flushes that are away: who sent what, and whose answer it is that comes back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from fathom.engine import sampling
from fathom.engine.deep import DeepLost, DeepStage, FlushItem, FlushResult
from fathom.engine.sequence import Sequence as Completion
from fathom.ledger import Ledger
from fathom.types import AcceptMode


@dataclass(frozen=True, slots=True)
class Share:
    """A sequence's part in a flush.

    Attributes:
        rows: of its stack that went. whole: whether that was all of it.
        scored: outputs that score prompt tokens, before those for decisions.
    """

    seq: Completion
    rows: int
    whole: bool
    scored: int
    decisions: int

    @property
    def outputs(self) -> int:
        """Rows of logits that come back."""
        return self.scored + self.decisions


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one sequence.

    Attributes:
        result: ``share.outputs`` rows; None after a failure.
        error: why. lost: because the deep stage is gone.
    """

    share: Share
    result: FlushResult | None = None
    error: str | None = None
    lost: bool = False

    @property
    def best(self) -> Sequence[float]:
        """The largest logit of each row: finite iff the row is."""
        return () if self.result is None else self.result.best


class Flights:
    """Sends stacks to the deep stage and takes its answers in, in order.

    Args:
        ledger: what is sent is entered there.
        keep_states: whether exit states are kept when the deep stage has seen them.
    """

    def __init__(self, deep: DeepStage, ledger: Ledger, *, keep_states: bool) -> None:
        self._deep = deep
        self._keep_states = keep_states
        self._ledger = ledger
        self._away: deque[tuple[Future[FlushResult], list[Share]]] = deque()

    def send(self, chosen: Sequence[tuple[Completion, int]]) -> None:
        """Flush the first rows of these sequences' stacks as one batch."""
        items: list[FlushItem] = []
        shares: list[Share] = []
        for seq, rows in chosen:
            whole = seq.deep_len + rows == seq.shallow_len
            # A prompt that is not scored yet has no row between its last one scored and the
            # first decision, so both together are the item's last rows.
            share = Share(
                seq,
                rows,
                whole,
                scored=seq.prompt_rows_due(seq.deep_len, rows),
                decisions=len(seq.judged) if whole else 0,
            )
            copied = seq.copied_rows(seq.deep_len, rows)
            place = self._deep.cache.rows(seq.seq_id, seq.deep_len, rows)
            items.append(
                FlushItem(
                    seq.seq_id,
                    place.blocks,
                    place.start,
                    seq.states.rows(seq.deep_len, seq.deep_len + rows),
                    share.outputs,
                    copied,
                    logits=reads_logits(seq),
                    drafts=_drafts(seq) if whole else (),
                )
            )
            shares.append(share)
            seq.in_flight = True
            self._ledger.enter_copied_rows(seq.compute, len(copied))
            for run in items[-1].parts(copied=False)[0]:
                self._ledger.enter_rows(
                    seq.compute,
                    start=run.start,
                    rows=run.num_rows,
                    first_decision=seq.num_prompt - 1,
                    layers=self._ledger.costs.deep_layers,
                    deep=True,
                )
            self._ledger.enter_lm_head(seq.compute, share.outputs)
        self._ledger.enter_flush([share.seq.compute for share in shares])
        self._away.append((self._deep.flush(items), shares))

    @property
    def next_answer(self) -> Future[FlushResult] | None:
        """The first answer that is awaited; None if nothing is away."""
        return self._away[0][0] if self._away else None

    def land_all(self) -> Iterator[Answer]:
        """Every answer; waits for all that is away."""
        while self._away:
            yield from self.land(block=True)

    def land(self, *, block: bool) -> Iterator[Answer]:
        """The answers that are there; waits for the first flush if ``block``.

        A deep stage that failed fails the sequences of that flush, not the engine.
        """
        while self._away and (block or self._away[0][0].done()):
            future, shares = self._away.popleft()
            block = False
            for share in shares:
                share.seq.in_flight = False
            try:
                result = future.result()
            except Exception as error:
                reason, lost = f"the deep stage failed: {error}", isinstance(error, DeepLost)
                for share in shares:
                    yield Answer(share, None, reason, lost)
                continue
            row = logits_row = 0
            for share in shares:
                share.seq.deep_len += share.rows
                if not self._keep_states:
                    share.seq.states.drop(share.seq.states_due)
                logits = share.outputs if reads_logits(share.seq) else 0
                yield Answer(share, result.part(row, share.outputs, logits_row, logits))
                row += share.outputs
                logits_row += logits


def reads_logits(seq: Completion) -> bool:
    """Whether whole rows of logits are needed, more than the best token of each.

    Fixed for a sequence: a flush that is away is read as it was sent.
    """
    params = seq.request.sampling
    plain = sampling.is_greedy(params) and sampling.is_plain(params)
    return not plain or params.logprobs is not None or seq.scores is not None


def _drafts(seq: Completion) -> list[int]:
    """Drafts whose logprob mode ``rollback`` asks for, one an output; empty for other modes."""
    if seq.request.compute.mode is not AcceptMode.ROLLBACK or reads_logits(seq):
        return []
    return [-1 if decision.token is None else decision.token for decision in seq.judged]
