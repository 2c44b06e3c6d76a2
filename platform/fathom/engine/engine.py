"""The engine: continuous batching over a shallow stage here and a deep stage behind its seam."""

from __future__ import annotations

import math
import time
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from fathom.config import EngineConfig
from fathom.engine.acceptance import Acceptance
from fathom.engine.completions import Completions
from fathom.engine.costs import StageCosts
from fathom.engine.deep import DeepStage, FlushResult
from fathom.engine.drafting import may_pause
from fathom.engine.figures import figures, pressure
from fathom.engine.flights import Answer, Flights
from fathom.engine.flush_rules import FlushWhen
from fathom.engine.info import EngineInfo
from fathom.engine.output import confirm
from fathom.engine.recovery import recover
from fathom.engine.requests import check_request, check_stack, new_sequences
from fathom.engine.resume import resume
from fathom.engine.rules import Rules
from fathom.engine.scheduler import Scheduler, ShallowWork
from fathom.engine.sequence import Sequence
from fathom.engine.shadowing import begin, tell_end
from fathom.engine.shallow import ShallowStage
from fathom.engine.text import DetokenizerFactory
from fathom.engine.trace import TraceListener
from fathom.exits.live import LivePolicies
from fathom.exits.load import Ladder, LadderPoints, LoadConfig, LoadShift
from fathom.exits.shadow import ShadowLog
from fathom.ledger import Ledger
from fathom.types import (
    ComputePolicy,
    FinishReason,
    InvalidRequest,
    Request,
    RequestOutput,
)

_LONGEST_WAIT_S = 0.02
"""Seconds that a step with nothing to do waits for answers."""


class Engine:
    """Makes tokens for many requests at once. Not thread-safe: one thread owns it.

    Build one with ``Engine.from_config``; the constructor takes the built parts.

    Attributes:
        info: what it runs. ledger: the account of compute since it started.
        policies: what the exit policies have seen. shadow: the completions that are compared with
            the full model, or None.
        stage_costs: measured at the start. tokenizer: None where nothing is encoded here.
    """

    def __init__(
        self,
        *,
        info: EngineInfo,
        shallow: ShallowStage,
        deep: DeepStage,
        scheduler: Scheduler,
        ledger: Ledger,
        policies: LivePolicies,
        stage_costs: StageCosts,
        pause_drafting: bool = True,
        flush_rule: FlushWhen = FlushWhen.RATE,
        new_detokenizer: DetokenizerFactory | None = None,
    ) -> None:
        self.info = info
        self.ledger = ledger
        self.policies = policies
        self.stage_costs = stage_costs
        self.tokenizer: Any = None
        self._shallow = shallow
        self._deep = deep
        self._scheduler = scheduler
        self._new_detokenizer = new_detokenizer
        self._rules = Rules(
            stage_costs,
            pause_drafting=pause_drafting,
            flush_when=flush_rule,
            on_gpu=shallow.on_gpu,
            deep_here=not deep.may_be_lost,
        )
        self._keep_states = deep.may_be_lost or scheduler.shared is not None
        self._flights = Flights(deep, ledger, keep_states=self._keep_states)
        self._completions = Completions(
            scheduler, lambda seq: tell_end(seq, self.policies, self.shadow)
        )
        self._next_seq_id = 0
        self._acceptance = Acceptance(
            info=info,
            ledger=ledger,
            shallow=scheduler.shallow_cache,
            deep=deep.cache,
            policies=policies,
            draft_rules=self._rules.drafts,
            column_of=shallow.head.column_of,
        )
        scheduler.begins_plain = self._begins_plain
        self._load: LoadShift | None = None
        self.shadow: ShadowLog | None = None

    @classmethod
    def from_config(cls, config: EngineConfig) -> Engine:
        """Load a model and build an engine.

        Raises:
            ConfigError: for a setting that cannot be used.
            ModelError: for a model that cannot be loaded.
        """
        from fathom.engine.build import build_engine

        return build_engine(config)

    @property
    def deep(self) -> DeepStage:
        """The deep stage, here or elsewhere, for its figures."""
        return self._deep

    def trace(self, listener: TraceListener | None, *, hidden: bool = False) -> None:
        """Tell ``listener`` of every draft that the deep stage has judged; None tells nobody.

        Args:
            hidden: whether records hold the exit states.
        """
        self._acceptance.listener = listener
        self._shallow.traced = listener is not None
        self._shallow.keeps_hidden = hidden

    def shift_under_load(self, config: LoadConfig, points: LadderPoints = ()) -> None:
        """Take cheaper settings under load, as far as requests allow it.

        Args:
            config: when; see ``exits.load``. points: see ``Ladder``.
        """
        if config.enabled:
            self._load = LoadShift(config, Ladder(points, self.policies.least_budget))
            self._shallow.load = self._load

    def take_points(self, points: LadderPoints) -> None:
        """Take other points under load; requests keep those that theirs is one of."""
        if self._load is not None:
            self._load.take(Ladder(points, self.policies.least_budget))

    # Requests

    def check_compute(self, compute: ComputePolicy) -> None:
        """Check that this engine can run a policy.

        Raises:
            InvalidRequest: naming the field, its value and the remedy.
        """
        compute.validate()
        check_stack(compute, self._scheduler.max_rows)
        self.policies.check(compute)

    def add_request(self, request: Request) -> None:
        """Queue a request; its outputs come from ``step``.

        Raises:
            InvalidRequest: naming the field, its value and the remedy.
        """
        if request.request_id in self._completions.families:
            raise InvalidRequest(
                f"request_id {request.request_id!r} is in use by a live request.",
                param="request_id",
            )
        check_request(
            request,
            self.info,
            max_rows=self._scheduler.max_rows,
            has_tokenizer=self._new_detokenizer is not None,
        )
        self.policies.check(request.compute)
        family = new_sequences(request, self.info, self._next_seq_id, self._new_detokenizer)
        if request.resumed:
            resume(family, self.info, self.ledger)
        if self.shadow is not None:
            begin(self.shadow, family)
        self._next_seq_id += len(family)
        self._completions.families[request.request_id] = family
        self._scheduler.waiting.append(family[0])
        for seq in list(family):
            if seq.finish_reason is not None:  # the loss came before the news of its end
                self._completions.retire(seq)

    def cancel(self, request_id: str) -> bool:
        """End a request; its last outputs have ``finish_reason`` cancelled.

        Returns:
            whether there was such a request.
        """
        if request_id not in self._completions.families:
            return False
        self._completions.end_request(request_id, FinishReason.CANCELLED)
        return True

    def has_work(self) -> bool:
        """Whether ``step`` has anything to do or to report."""
        return bool(self._completions)

    def step(self) -> list[RequestOutput]:
        """Schedule, draft, flush, accept: one shallow pass and at most one deep pass.

        A request with non-finite logits ends with an error; the others go on.

        Returns:
            what is new: tokens, text, ends.
        """
        self._completions.end_expired()
        if self._load is not None:
            self._load.update(pressure(self._scheduler, self._deep))
        self._land_loads()
        work = self._scheduler.schedule()
        if work:
            self._draft(work)
        self._collect()
        flushed = self._flush()
        if not work and not flushed:  # only an answer can move things on
            self._wait_for_answer()
        self._collect()
        return self._completions.take_outputs()

    def stats(self) -> dict[str, float]:
        """Figures of this moment and totals since the start; names as in the metrics."""
        return {
            **figures(self._scheduler, self._deep, self.ledger),
            **self.policies.figures(),
            **self._rules.figures(),
            "load_level": 0 if self._load is None else self._load.level,
        }

    def check_integrity(self) -> None:
        """Check that blocks and sequences add up; cheap enough for tests and idle moments.

        Raises:
            AssertionError: naming what does not.
        """
        running = {seq.seq_id for seq in self._scheduler.running}
        self._scheduler.shallow_cache.check_integrity(running)
        self._deep.cache.check_integrity(running)

    def move_deep(self) -> None:
        """Go to the deep stage that is the best now, as if this one had been lost."""
        if self._deep.may_be_lost:
            self._recover()

    def close(self) -> None:
        """Release the deep stage and the KV store."""
        self._deep.close()
        if self._scheduler.shared is not None:
            self._scheduler.shared.close()

    # Draft

    def _draft(self, work: list[ShallowWork]) -> None:
        traced = self._acceptance.listener is not None  # a trace is of every row
        pause = frozenset() if traced else self._rules.pauses(self._scheduler.running)
        begin = time.perf_counter()
        decided = self._shallow.run(work, pause=pause)
        seconds = time.perf_counter() - begin
        self._rules.drafted(work, [seq for seq, _ in decided], seconds)
        for seq, logits in decided:
            decision = seq.pending[-1]
            compute = seq.request.compute
            rule = self._rules.of(seq)
            if rule is not None and not math.isnan(decision.confidence):
                rule.decided(exited=decision.token is not None)
            if decision.token is None:
                continue
            if not compute.holds_drafts:
                assert logits is not None
                depth, shifted = self.info.exit_depth, decision.shifted
                confirm(seq, decision.token, depth, logits, self.ledger, shifted=shifted)
            # The end of the text, as drafted, goes to the deep stage at once.
            if seq.finish_reason or self._may_end(seq, decision.token):
                seq.waiting = True
            if compute.mode in pause and may_pause(seq):  # a scout keeps step with the others
                seq.waiting = True
            # No decision waits for the deep stage, but the stack must not grow without end.
            if compute.copies_states and seq.num_drafts >= compute.max_stack:
                seq.waiting = True
            self._completions.report(seq)

    def _begins_plain(self, seq: Sequence) -> bool:
        if self._acceptance.listener is not None or not self._shallow.has_exit_layers:
            return False
        return self._rules.pauses_for(seq, len(self._scheduler.running))

    def _may_end(self, seq: Sequence, token: int) -> bool:
        length = len(seq.tokens) - seq.num_prompt
        return length >= seq.max_tokens or token in seq.stop_ids

    # Flush

    def _flush(self) -> bool:
        if not self._rules.flush_now(self._scheduler.running):
            return False
        chosen = self._scheduler.select_flush()
        if not chosen:
            return False
        begin = time.perf_counter()
        self._flights.send(chosen)
        self._rules.flushed(chosen, time.perf_counter() - begin)
        return True

    def _wait_for_answer(self) -> None:
        """Wait for whatever is away, but not for long: new requests and cancellations wait too."""
        shared, flight = self._scheduler.shared, self._flights.next_answer
        away: list[Future[Any]] = [] if shared is None else list(shared.next_answers)
        if flight is not None:
            away.append(flight)
        if away:
            wait(away, timeout=_LONGEST_WAIT_S, return_when=FIRST_COMPLETED)

    def _land_loads(self, *, block: bool = False) -> None:
        """Let sequences go on whose blocks have come; wait for all of them if ``block``."""
        shared = self._scheduler.shared
        for seq in shared.land(block=block) if shared is not None else ():
            if seq.finish_reason is not None:  # it was ended in the meantime
                self._completions.retire(seq)

    def _collect(self) -> None:
        """Take in the answers that are there, in order."""
        lost = False
        for answer in self._flights.land(block=False):
            seq = answer.share.seq
            lost = lost or answer.lost
            if seq.finish_reason in (FinishReason.CANCELLED, FinishReason.DEADLINE):
                self._completions.retire(seq)
            elif answer.lost:
                continue  # it is recomputed
            elif answer.error is not None:
                self._completions.end(seq, FinishReason.ERROR, answer.error)
            elif not all(map(math.isfinite, answer.best)):
                self._completions.end(seq, FinishReason.ERROR, "the model's logits are not finite")
            else:
                self._take_in(answer)
        if lost:
            self._recover()

    def _recover(self) -> None:
        for _ in self._flights.land_all():
            pass  # they went to the same place
        self._land_loads(block=True)
        recover(self._deep, self._scheduler, self._completions)

    def _take_in(self, answer: Answer) -> None:
        """Take in the answer to one sequence: the prompt's scores, then decisions."""
        share, scored, result = answer.share, answer.share.scored, answer.result
        assert result is not None
        if scored and share.seq.scores is not None:
            share.seq.scores.add(result.logits[:scored])
        if share.whole:
            rows = len(result.logits)
            self._accept(share.seq, result.part(scored, share.decisions, scored, rows))

    # Accept

    def _accept(self, seq: Sequence, result: FlushResult) -> None:
        """Take in the answer to one sequence's decisions: a row each, finite."""
        if not seq.max_tokens:
            self._scheduler.publish(seq)
            # Its prompt was to be scored and no more; the first of its family reports that.
            self._completions.end_request(seq.request.request_id, FinishReason.LENGTH)
            return
        self._acceptance.take(seq, result)
        self._scheduler.publish(seq)
        self._fork_children(seq)
        if seq.finish_reason:
            self._completions.retire(seq)
        else:
            self._completions.report(seq)

    def _fork_children(self, seq: Sequence) -> None:
        """Start the other completions of a request on the prompt blocks of the first."""
        children, seq.children = seq.children, []
        length = seq.num_prompt - 1  # each draws its own first token from the last prompt row
        for child in children:
            if not self._scheduler.start_running(child):
                self._scheduler.waiting.appendleft(child)
                continue
            self._scheduler.shallow_cache.fork(seq.seq_id, child.seq_id, length)
            self._deep.cache.fork(seq.seq_id, child.seq_id, length)
            child.plain = seq.plain
            child.restart(length)
            child.cached_tokens = length
            child.shared_blocks = seq.shared_blocks
            if self._keep_states:
                child.states = seq.states.fork(length)
