"""One completion on its way: its tokens, how far each stage has come, and what is undecided."""

from __future__ import annotations

import bisect
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from fathom.engine.scoring import PromptScores
from fathom.engine.states import ExitStates
from fathom.engine.text import TextStream
from fathom.kvstore.keys import BlockKey
from fathom.types import ComputeUsage, FinishReason, PolicyName, Request, Token

if TYPE_CHECKING:
    from fathom.engine.trace import Notes
    from fathom.exits.shadow import Notes as ShadowNotes


@dataclass(slots=True)
class Decision:
    """What the shallow stage decided at one row, until a flush has looked at it.

    Attributes:
        position: position of the row that decides; the token goes to ``position + 1``.
        token: the draft, or None where the deep stage decides.
        confidence: of the draft, by the request's own measure; NaN where the head was not asked.
        draft_probs: [vocabulary] float64 that the draft was drawn from, where the accept rule
            needs it (``exact`` at temperature > 0).
        best: the exit head's best token, exited or not; -1 where it was not asked.
        probe: the draft would have left, but the deep stage is asked all the same.
        notes: what else the exit head said; where the engine is traced.
        resumed: another engine's draft, lost with it: judged again, but in no account or trace.
        shifted: it was taken at a cheaper setting than asked for, because of load.
    """

    position: int
    token: int | None
    confidence: float
    draft_probs: torch.Tensor | None = None
    best: int = -1
    probe: bool = False
    notes: Notes | None = None
    resumed: bool = False
    shifted: bool = False


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one completion.

    Positions [0, shallow_len) have shallow KV, [0, deep_len) have deep KV, and the exit-layer
    hidden states of [deep_len, shallow_len) are the *stack*. Those of [0, exit_len) have KV in the
    exit layers, which lag behind where drafting pauses. Rows before ``decided`` have chosen
    their token. Tokens before ``confirmed`` are final.

    Attributes:
        seq_id: the key in both KV caches.
        index: which of the request's completions. seed: of its draws.
        tokens: prompt and output, drafts included. stop_ids: tokens that end it.
        deep_ahead: leading positions whose deep KV came from the KV store before the shallow stage
            got there: rows up to here never go on the stack.
        states: exit-layer hidden states, those of the stack at least, and those that the exit
            layers have not seen. Earlier ones are kept where the deep stage may be lost, or blocks
            are shared.
        never_drafts: the exit layers lag too far behind to catch up.
        plain: it began while drafting paused. Its rows pass no exit layers until the pause is over,
            and its blocks are those of requests that do not draft.
        pending: decisions that no flush has looked at; positions are >= deep_len.
        waiting: it needs the deep stage before it can go on.
        in_flight: its stack is away in a flush.
        copied: positions, ascending, whose deep keys and values are projected from the exit state.
        asked: rows at which the exit head spoke, of those that stand. wrong: those of them that
            left, or would have but for a probe, against the deep stage's choice; in mode ``copy``,
            where probes alone tell, each counts 1 / probe rate.
        epoch: output tokens that the deep stage has chosen (see ``random.uniform``).
        finish_reason: set once no more tokens come; a final flush may still be due.
        published_blocks: leading blocks that the prefix cache knows in both stages.
        shared_blocks: leading blocks that were offered to the KV store, or came from there.
        children: sequences of the same request that will share this one's prompt blocks.
        scores: of the prompt, where they are asked for; completion 0 alone has them.
        shadow: what is noted of it where it is in the shadow (``exits.shadow``), else None.
    """

    seq_id: int
    request: Request
    index: int
    seed: int
    max_tokens: int
    tokens: list[int]
    stop_ids: tuple[int, ...]
    text: TextStream
    scores: PromptScores | None = None
    parent: Sequence | None = None
    children: list[Sequence] = field(default_factory=list)
    shallow_keys: list[BlockKey] = field(default_factory=list)
    deep_keys: list[BlockKey] = field(default_factory=list)
    shallow_len: int = 0
    deep_len: int = 0
    deep_ahead: int = 0
    exit_len: int = 0
    never_drafts: bool = False
    plain: bool = False
    states: ExitStates = field(default_factory=ExitStates)
    pending: list[Decision] = field(default_factory=list)
    copied: list[int] = field(default_factory=list)
    decided: int = 0
    waiting: bool = False
    in_flight: bool = False
    asked: int = 0
    wrong: float = 0.0
    epoch: int = 0
    confirmed: int = 0
    published_blocks: int = 0
    shared_blocks: int = 0
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    retriable: bool = False
    new_tokens: list[Token] = field(default_factory=list)
    compute: ComputeUsage = field(default_factory=ComputeUsage)
    shadow: ShadowNotes | None = None
    added_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.decided = self.num_prompt - 1
        self.confirmed = self.num_prompt
        compute = self.request.compute
        self.compute.mode = compute.mode.value
        self.compute.operating_point = compute.operating_point
        if compute.policy is PolicyName.BUDGET:
            self.compute.requested_budget = compute.budget

    @property
    def num_prompt(self) -> int:
        """Prompt tokens."""
        return len(self.request.prompt_token_ids)

    @property
    def num_confirmed_output(self) -> int:
        """Final output tokens."""
        return self.confirmed - self.num_prompt

    @property
    def rows_due(self) -> int:
        """Rows that the shallow stage has to run before the sequence waits or decides."""
        # A waiting sequence may hold a token (a drafted EOS) whose row is never run; after a
        # preemption it has rows to run again.
        target = self.decided if self.waiting else len(self.tokens)
        return max(0, target - self.shallow_len)

    @property
    def is_drafting(self) -> bool:
        """Whether its next shallow row decides a token."""
        return not self.waiting and not self.in_flight and self.rows_due == 1

    @property
    def is_flushable(self) -> bool:
        """Whether its stack can go to the deep stage now."""
        return self.waiting and not self.in_flight and self.rows_due == 0

    @property
    def states_due(self) -> int:
        """Position of the first exit state that a stage has not seen."""
        catches_up = self.request.compute.drafts and not self.never_drafts
        return min(self.deep_len, self.exit_len) if catches_up else self.deep_len

    @property
    def keyed_for_drafts(self) -> bool:
        """Whether its blocks have keys and values of the exit layers, too."""
        return self.request.compute.drafts and not self.plain

    @property
    def num_drafts(self) -> int:
        """Drafted tokens that no flush has looked at."""
        return sum(decision.token is not None for decision in self.pending)

    @property
    def spent(self) -> tuple[int, int]:
        """Output tokens decided at the exit, and all; in both are drafts without a verdict."""
        held = self.num_drafts if self.request.compute.holds_drafts else 0
        return self.compute.exited + held, self.compute.decided + held

    @property
    def judged(self) -> list[Decision]:
        """Pending decisions that the deep stage answers: all, unless drafts are never verified."""
        if not self.request.compute.copies_states:
            return self.pending
        return [decision for decision in self.pending if decision.token is None]

    def copied_rows(self, start: int, rows: int) -> list[int]:
        """Which of the rows [start, start + rows) are copied, counted from ``start``."""
        first, stop = (bisect.bisect_left(self.copied, p) for p in (start, start + rows))
        return [position - start for position in self.copied[first:stop]]

    def prompt_rows_due(self, start: int, rows: int) -> int:
        """How many of the rows [start, start + rows) are wanted for the prompt's scores."""
        return 0 if self.scores is None else self.scores.rows_due(start, rows)

    def expired(self, now: float) -> bool:
        """Whether its deadline has passed at ``now`` (time.monotonic seconds)."""
        timeout = self.request.timeout_s
        return timeout is not None and now - self.added_at > timeout

    def ran_shallow(self, rows: int) -> None:
        """Count rows that the shallow stage has run; what deep KV is there already counts too."""
        self.shallow_len += rows
        self.deep_len = max(self.deep_len, min(self.deep_ahead, self.shallow_len))

    def forget_kv(self) -> None:
        """Back to no KV at all; tokens and decisions stay, so nothing is decided twice."""
        self.restart(0)

    def restart(self, length: int) -> None:
        """Go on from the first ``length`` positions, which have KV in both stages."""
        self.shallow_len = self.deep_len = self.exit_len = length
        self.deep_ahead = 0
        self.never_drafts = self.plain and length > 0  # their exit layers' keys are nowhere
        self.published_blocks = self.shared_blocks = 0
        self.states = ExitStates(length)
