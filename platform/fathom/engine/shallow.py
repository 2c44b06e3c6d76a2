"""The shallow stage: layers [0, k), perhaps exit layers, and the exit head. It drafts."""

from __future__ import annotations

from collections.abc import Container
from collections.abc import Sequence as Rows
from itertools import accumulate

import torch

from fathom.attention.backend import SequenceRows
from fathom.attention.paged_cache import PagedKVCache
from fathom.engine import sampling
from fathom.engine.confidences import ExitRows, confidences
from fathom.engine.drafting import CATCH_UP_ROWS, MAX_LAG, is_scout, may_pause
from fathom.engine.random import Draw, uniform
from fathom.engine.scheduler import ShallowWork
from fathom.engine.sequence import Decision, Sequence
from fathom.engine.stage import Pass, Stage
from fathom.engine.trace import take_notes
from fathom.exits.live import LivePolicies
from fathom.exits.load import LoadShift, Rung
from fathom.exits.meta import MetaClassifier
from fathom.exits.policy import exits
from fathom.ledger import Ledger
from fathom.models.heads import ExitHead
from fathom.types import AcceptMode, ComputePolicy, Confidence, PolicyName


class ShallowStage:
    """Runs rows up to the exit layer, and decides for each sequence whether its token leaves.

    Attributes:
        head: the exit head. meta: the classifier of the confidence of that name, or None.
        traced: whether decisions note all that the head says. keeps_hidden: exit states too.
        load: what takes cheaper settings under load, or None.
    """

    def __init__(
        self,
        stage: Stage,
        cache: PagedKVCache,
        head: ExitHead,
        ledger: Ledger,
        policies: LivePolicies,
        meta: MetaClassifier | None = None,
    ) -> None:
        self._stage = stage
        self._cache = cache
        self.head = head
        self.meta = meta
        self._meta_params = sum(p.numel() for p in meta.parameters()) if meta is not None else 0
        self._ledger = ledger
        self._policies = policies
        self._width = stage.decoder.config.hidden_size
        self.traced = False
        self.keeps_hidden = False
        self.load: LoadShift | None = None

    @property
    def has_exit_layers(self) -> bool:
        """Whether drafting takes layers of its own."""
        return self._stage.exit_layers is not None

    @property
    def on_gpu(self) -> bool:
        """Whether its passes run on a GPU, which answers before they are over."""
        return self._stage.decoder.device.type == "cuda"

    def run(
        self, work: Rows[ShallowWork], *, pause: Container[AcceptMode] = ()
    ) -> list[tuple[Sequence, torch.Tensor | None]]:
        """Run one pass, push the exit states on the sequences' stacks, and decide.

        Args:
            pause: modes whose sequences draft nothing where they can do without.

        Returns:
            the sequences that decided a token (their last pending decision), each with the exit
            head's logits of its row if it drafted: [vocabulary] where logprobs are asked for.
        """
        decoder = self._stage.decoder
        ids: list[int] = []
        rows: list[SequenceRows] = []
        deciding: list[tuple[Sequence, int]] = []
        for item in work:
            seq, start = item.seq, item.seq.shallow_len
            ids += seq.tokens[start : start + item.num_rows]
            rows.append(self._cache.rows(seq.seq_id, start, item.num_rows))
            self._enter(seq, start, item.num_rows, self._ledger.costs.exit_layer)
            if item.decides:
                deciding.append((seq, len(ids) - 1))
        whole = self._stage.plan(rows)
        hidden = decoder.embed(torch.tensor(ids, dtype=torch.int64, device=decoder.device))
        # Without layers of its own, the exit reads what the stage puts out.
        noting = self._stage.exit_layers is None and self._notes_earlier(work)
        hidden = self._stage.run(whole, hidden, noting=noting)
        states = hidden[:, : self._width]
        row = 0
        for item in work:
            item.seq.states.append(states[row : row + item.num_rows])
            item.seq.ran_shallow(item.num_rows)
            row += item.num_rows
        return self._decide(deciding, self._exit_states(work, whole, hidden, pause=pause))

    def _exit_states(
        self,
        work: Rows[ShallowWork],
        whole: Pass,
        hidden: torch.Tensor,
        *,
        pause: Container[AcceptMode],
    ) -> torch.Tensor:
        """What the exit head reads: [rows, d], undefined where a sequence does not draft; where
        somebody compares, [rows, 2 * d] with the states one layer before behind.

        Every row of a sequence that drafts passes the exit layers, for later rows look back at it.
        Rows that came in a pause pass them when it is over; prompts as well, where the sequence
        began in it.
        """
        places = self._exit_rows(work, pause=pause)
        for seq, start, count in places:
            self._enter(seq, start, count, self._ledger.costs.exit_layers)
            seq.exit_len = start + count
        if self._stage.exit_layers is None or not places:
            return hidden
        noting = self._notes_earlier(work)
        if sum(count for _, _, count in places) == len(hidden) and len(places) == len(work):
            return self._stage.run_exit_layers(whole, hidden, noting=noting)
        part = self._stage.plan([self._cache.rows(s.seq_id, start, n) for s, start, n in places])
        states = torch.cat([s.states.rows(start, start + n) for s, start, n in places])
        states = self._stage.run_exit_layers(part, states, noting=noting)
        exit_states = states.new_empty(len(hidden), states.shape[1])
        ends = dict(
            zip((s for s, _, _ in places), accumulate(n for _, _, n in places), strict=True)
        )
        row = 0
        for item in work:
            row += item.num_rows
            end = ends.get(item.seq)
            if end is not None and item.seq.exit_len == item.seq.shallow_len:
                exit_states[row - item.num_rows : row] = states[end - item.num_rows : end]
        return exit_states

    def _exit_rows(
        self, work: Rows[ShallowWork], *, pause: Container[AcceptMode]
    ) -> list[tuple[Sequence, int, int]]:
        """Which rows pass the exit layers now: sequence, first position, how many."""
        places: list[tuple[Sequence, int, int]] = []
        spare = CATCH_UP_ROWS
        for item in work:
            seq, own = item.seq, item.num_rows
            lag = seq.shallow_len - own - seq.exit_len
            if lag > MAX_LAG:
                seq.never_drafts = True
            if not seq.request.compute.drafts or seq.never_drafts:
                continue
            answers = seq.shallow_len > seq.num_prompt and own == 1
            scouts = is_scout(seq) or seq.shadow is not None
            mode = seq.request.compute.mode
            if mode in pause and (answers or seq.plain) and may_pause(seq) and not scouts:
                continue
            if lag <= spare:
                places.append((seq, seq.exit_len, lag + own))
            elif spare:
                places.append((seq, seq.exit_len, spare))
            spare -= min(lag, spare)
        return places

    def _notes_earlier(self, work: Rows[ShallowWork]) -> bool:
        """Whether somebody compares the exit states with those of one layer before."""
        return self.traced or any(
            item.seq.request.compute.confidence is Confidence.SATURATION for item in work
        )

    def _enter(self, seq: Sequence, start: int, rows: int, layers: int) -> None:
        self._ledger.enter_rows(
            seq.compute, start=start, rows=rows, first_decision=seq.num_prompt - 1, layers=layers
        )

    def _decide(
        self, deciding: Rows[tuple[Sequence, int]], hidden: torch.Tensor
    ) -> list[tuple[Sequence, torch.Tensor | None]]:
        decided: list[tuple[Sequence, torch.Tensor | None]] = []
        drafting: list[tuple[Sequence, int]] = []
        for seq, row in deciding:
            if self._may_draft(seq):
                drafting.append((seq, row))
            else:
                self._leave_to_deep_stage(seq, float("nan"))
                decided.append((seq, None))
        if not drafting:
            return decided
        index = torch.tensor([row for _, row in drafting], device=hidden.device)
        states, *earlier = torch.split(hidden[index], self._width, dim=1)
        rows = ExitRows(self.head.logits(states), states, earlier[0] if earlier else None)
        computes = [seq.request.compute for seq, _ in drafting]
        scores, columns = confidences(computes, rows, self.meta)
        notes = take_notes(rows, hidden=self.keeps_hidden) if self.traced else [None] * len(index)
        for (seq, _), confidence, column, logits, note in zip(
            drafting, scores, columns, rows.logits, notes, strict=True
        ):
            self._ledger.enter_exit_head(seq.compute, 1)
            if self.meta is not None and seq.request.compute.confidence is Confidence.META:
                self._ledger.enter_meta(seq.compute, self._meta_params)
            self._draft(seq, confidence, column, logits)
            decision = seq.pending[-1]
            decision.best = self.head.token_of(column)
            decision.notes = note
            decision.shifted = self._rung(seq.request.compute) is not None
            reported = seq.request.sampling.logprobs is not None
            decided.append((seq, self.head.spread(logits) if reported else logits))
        return decided

    def _rung(self, compute: ComputePolicy) -> Rung | None:
        """What the load leaves of a request's policy; None for all of it."""
        return None if self.load is None else self.load.rung(compute)

    def _may_draft(self, seq: Sequence) -> bool:
        compute = seq.request.compute
        if not compute.drafts or seq.num_drafts >= compute.max_stack or not seq.max_tokens:
            return False
        if seq.exit_len < seq.shallow_len:  # its exit state is not there
            return False
        # Held drafts cannot be shown before a flush: let the first token come as early as full
        # depth can make it, with the prompt's own flush. Nor is a prompt's row ever copied.
        held = compute.holds_drafts or compute.copies_states
        return not (held and seq.decided < seq.num_prompt)

    def _leave_to_deep_stage(
        self, seq: Sequence, confidence: float, *, probe: bool = False
    ) -> None:
        seq.pending.append(Decision(seq.shallow_len - 1, None, confidence, probe=probe))
        seq.decided = seq.shallow_len
        seq.waiting = True

    def _draft(self, seq: Sequence, confidence: float, column: int, logits: torch.Tensor) -> None:
        """Choose a draft; keep it if the exit policy lets it go."""
        position = seq.shallow_len - 1
        compute = seq.request.compute
        rung = self._rung(compute)
        if rung is not None:
            compute = rung.compute
        chance = 0.0
        if compute.policy is PolicyName.FORCED:
            chance = uniform(seq.seed, position, seq.epoch, Draw.FORCED_EXIT)
        threshold = self._policies.threshold_for(compute, *seq.spent)
        if rung is not None:
            threshold = rung.lower(threshold)
        if not exits(compute, confidence, threshold=threshold, uniform=chance):
            return self._leave_to_deep_stage(seq, confidence)
        rate = compute.probes
        if rate and uniform(seq.seed, position, seq.epoch, Draw.PROBE) < rate:
            self._ledger.enter_probe(seq.compute)
            return self._leave_to_deep_stage(seq, confidence, probe=True)
        params = seq.request.sampling
        probs = None
        if sampling.is_greedy(params) and sampling.is_plain(params):
            token = self.head.token_of(column)
        else:
            adjusted = sampling.adjust(
                self.head.spread(logits),
                params,
                seq.request.prompt_token_ids,
                seq.tokens[seq.num_prompt :],
                seq.stop_ids,
            )
            if bool(torch.isneginf(adjusted).all()):  # every scored token is ruled out
                return self._leave_to_deep_stage(seq, confidence)
            if sampling.is_greedy(params):
                token = int(adjusted.argmax())
            else:
                probs = sampling.distribution(adjusted, params)
                token = sampling.draw(probs, uniform(seq.seed, position, seq.epoch, Draw.DRAFT))
        keep = probs if compute.mode is AcceptMode.EXACT else None
        seq.pending.append(Decision(position, token, confidence, keep))
        seq.tokens.append(token)
        seq.decided = seq.shallow_len
        if compute.copies_states:
            seq.copied.append(position)
            self._policies.observe(compute, confidence, None)  # no flush will look at it
            seq.asked += 1
            if seq.shadow is not None:
                seq.shadow.row(confidence, agrees=None, stands=True)
        self._ledger.enter_draft(seq.compute)
        return None
