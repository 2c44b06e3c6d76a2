"""Taking the deep stage's answers into sequences: verdicts, cuts, tokens, and what is learned."""

from __future__ import annotations

from collections.abc import Callable

from fathom.attention.paged_cache import PagedKVCache
from fathom.engine import sampling
from fathom.engine.accept import judge
from fathom.engine.deep import FlushResult
from fathom.engine.drafting import DraftRules
from fathom.engine.flights import reads_logits
from fathom.engine.info import EngineInfo
from fathom.engine.output import confirm
from fathom.engine.sequence import Decision, Sequence
from fathom.engine.trace import TraceListener, record_of
from fathom.exits.live import LivePolicies
from fathom.ledger import Ledger


class Acceptance:
    """Applies the accept modes.

    Args:
        shallow, deep: block accounting of the stages, which cuts reach.
        policies, draft_rules: learn from every verdict.
        column_of: the exit head's column for a token, for traces.

    Attributes:
        listener: told of every draft that is judged, or None.
    """

    def __init__(
        self,
        *,
        info: EngineInfo,
        ledger: Ledger,
        shallow: PagedKVCache,
        deep: PagedKVCache,
        policies: LivePolicies,
        draft_rules: DraftRules | None,
        column_of: Callable[[int], int | None],
    ) -> None:
        self._info = info
        self._ledger = ledger
        self._shallow = shallow
        self._deep = deep
        self._policies = policies
        self._draft_rules = draft_rules
        self._column_of = column_of
        self.listener: TraceListener | None = None

    def take(self, seq: Sequence, result: FlushResult) -> None:
        """Apply the accept mode to the pending decisions of one sequence.

        Args:
            result: a row a decision, finite.
        """
        compute, params = seq.request.compute, seq.request.sampling
        rule = self._draft_rules.of(compute.mode) if self._draft_rules is not None else None
        pending, seq.pending = seq.judged, []
        seq.waiting = False
        as_it_is = sampling.is_greedy(params) and sampling.is_plain(params)
        rows = result.logits if reads_logits(seq) else [None] * len(pending)
        for decision, row, choice, logprob in zip(
            pending, rows, result.argmax, result.logprobs, strict=True
        ):
            scores, best = row, choice
            if not as_it_is:
                assert row is not None
                scores = sampling.adjust(
                    row,
                    params,
                    seq.request.prompt_token_ids,
                    seq.tokens[seq.num_prompt : decision.position + 1],
                    seq.stop_ids,
                )
                choice = int(scores.argmax())
            verdict = judge(
                decision,
                scores,
                choice,
                draft_logprob=logprob,
                compute=compute,
                params=params,
                seed=seq.seed,
                epoch=seq.epoch,
            )
            if decision.best >= 0:
                agrees = decision.best == best
                self._learn(seq, decision, agrees=agrees)
                if seq.shadow is not None:
                    # After copied keys and values the deep stage is not the full model.
                    told = None if compute.copies_states else agrees
                    seq.shadow.row(decision.confidence, agrees=told, stands=verdict.kept)
            if self.listener is not None and decision.notes is not None:
                self.listener(record_of(seq, decision, choice, self._column_of))
            drafted = decision.token is not None
            if drafted and not decision.resumed:
                self._ledger.enter_verdict(seq.compute, accepted=verdict.agreed)
                if rule is not None:
                    rule.judged(agreed=verdict.agreed)
            if drafted and not verdict.kept:
                self._cut(seq, decision.position + 1)
            if not verdict.kept:
                seq.tokens.append(verdict.token)
                seq.epoch += 1
            if compute.holds_drafts or not drafted:
                depth = self._info.exit_depth if verdict.kept else self._info.num_layers
                shifted = decision.shifted
                confirm(seq, verdict.token, depth, row, self._ledger, shifted=shifted)
            if (drafted and not verdict.kept) or (compute.holds_drafts and seq.finish_reason):
                break

    def _learn(self, seq: Sequence, decision: Decision, *, agrees: bool) -> None:
        """Tell the exit policies what the deep stage says of one row."""
        compute = seq.request.compute
        self._policies.observe(compute, decision.confidence, agrees)
        seq.asked += 1
        if not agrees and (decision.probe or decision.token is not None):
            seq.wrong += 1 / compute.probes if compute.copies_states else 1

    def _cut(self, seq: Sequence, length: int) -> None:
        """Cut a sequence to its first ``length`` tokens, in both stages."""
        del seq.tokens[length:]
        seq.shallow_len = min(seq.shallow_len, length)
        seq.deep_len = min(seq.deep_len, length)
        seq.exit_len = min(seq.exit_len, length)
        seq.states.cut(length)
        self._shallow.truncate(seq.seq_id, seq.shallow_len)
        self._deep.truncate(seq.seq_id, seq.deep_len)
        seq.decided = length
