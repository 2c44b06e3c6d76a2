"""The shallow stage: layers [0, k), perhaps exit layers, and the exit head. It drafts."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from fathom.attention.backend import SequenceRows
from fathom.attention.paged_cache import PagedKVCache
from fathom.engine import sampling
from fathom.engine.random import Draw, uniform
from fathom.engine.scheduler import ShallowWork
from fathom.engine.sequence import Decision, Sequence
from fathom.engine.stage import Pass, Stage
from fathom.exits.confidence import entropy, softmax_gap
from fathom.exits.policy import exits
from fathom.ledger import Ledger
from fathom.models.heads import ExitHead
from fathom.types import AcceptMode, PolicyName


class ShallowStage:
    """Runs rows up to the exit layer, and decides for each sequence whether its token leaves.

    Attributes:
        traced: whether decisions note the head's best token and entropy.
    """

    def __init__(self, stage: Stage, cache: PagedKVCache, head: ExitHead, ledger: Ledger) -> None:
        self._stage = stage
        self._cache = cache
        self._head = head
        self._ledger = ledger
        self.traced = False

    def run(self, work: Rows[ShallowWork]) -> list[tuple[Sequence, torch.Tensor | None]]:
        """Run one pass, push the exit states on the sequences' stacks, and decide.

        Returns:
            the sequences that decided a token (their last pending decision), each with the exit
            head's logits of its row if it drafted: [vocabulary] where logprobs are asked for.
        """
        decoder = self._stage.decoder
        ids: list[int] = []
        rows: list[SequenceRows] = []
        for item in work:
            seq, start = item.seq, item.seq.shallow_len
            ids += seq.tokens[start : start + item.num_rows]
            rows.append(self._cache.rows(seq.seq_id, start, item.num_rows))
            self._ledger.enter_rows(
                seq.compute,
                start=start,
                rows=item.num_rows,
                first_decision=seq.num_prompt - 1,
                layers=self._ledger.costs.shallow_layers(drafts=seq.request.compute.drafts),
            )
        whole = self._stage.plan(rows)
        hidden = decoder.embed(torch.tensor(ids, dtype=torch.int64, device=decoder.device))
        hidden = self._stage.run(whole, hidden)
        exit_states = self._exit_states(work, rows, whole, hidden)

        deciding = [item.decides for item in work]
        last_rows: list[int] = []
        row = 0
        for item in work:
            item.seq.states.append(hidden[row : row + item.num_rows])
            item.seq.shallow_len += item.num_rows
            row += item.num_rows
            last_rows.append(row - 1)
        return self._decide(
            [(w.seq, r) for w, r, d in zip(work, last_rows, deciding, strict=True) if d],
            exit_states,
        )

    def _exit_states(
        self,
        work: Rows[ShallowWork],
        rows: Rows[SequenceRows],
        whole: Pass,
        hidden: torch.Tensor,
    ) -> torch.Tensor:
        """What the exit head reads: [rows, d], undefined where a sequence never drafts.

        Every row of a sequence that drafts passes the exit layers, for later rows look back at it.
        """
        if self._stage.exit_layers is None:
            return hidden
        drafts = [item.seq.request.compute.drafts for item in work]
        if all(drafts):
            return self._stage.run_exit_layers(whole, hidden)
        if not any(drafts):
            return hidden
        part = self._stage.plan([r for r, own in zip(rows, drafts, strict=True) if own])
        mask = torch.tensor(drafts).repeat_interleave(torch.tensor([r.num_rows for r in rows]))
        index = mask.nonzero().flatten().to(hidden.device)
        exit_states = torch.empty_like(hidden)
        exit_states[index] = self._stage.run_exit_layers(part, hidden[index])
        return exit_states

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
        logits = self._head.logits(hidden[index])
        gaps, columns = softmax_gap(logits)
        for (seq, _), confidence, column, row_logits in zip(
            drafting, gaps.tolist(), columns.tolist(), logits, strict=True
        ):
            self._ledger.enter_exit_head(seq.compute, 1)
            self._draft(seq, confidence, column, row_logits)
            if self.traced:
                decision = seq.pending[-1]
                decision.best = self._head.token_of(column)
                decision.entropy = entropy(row_logits)
            reported = seq.request.sampling.logprobs is not None
            decided.append((seq, self._head.spread(row_logits) if reported else row_logits))
        return decided

    def _may_draft(self, seq: Sequence) -> bool:
        compute = seq.request.compute
        if not compute.drafts or seq.num_drafts >= compute.max_stack or not seq.max_tokens:
            return False
        # Held drafts cannot be shown before a flush: let the first token come as early as full
        # depth can make it, with the prompt's own flush. Nor is a prompt's row ever copied.
        held = compute.holds_drafts or compute.copies_states
        return not (held and seq.decided < seq.num_prompt)

    def _leave_to_deep_stage(self, seq: Sequence, confidence: float) -> None:
        seq.pending.append(Decision(seq.shallow_len - 1, None, confidence))
        seq.decided = seq.shallow_len
        seq.waiting = True

    def _draft(self, seq: Sequence, confidence: float, column: int, logits: torch.Tensor) -> None:
        """Choose a draft; keep it if the exit policy lets it go."""
        position = seq.shallow_len - 1
        compute = seq.request.compute
        chance = 0.0
        if compute.policy is PolicyName.FORCED:
            chance = uniform(seq.seed, position, seq.epoch, Draw.FORCED_EXIT)
        if not exits(compute, confidence, uniform=chance):
            return self._leave_to_deep_stage(seq, confidence)
        params = seq.request.sampling
        probs = None
        if sampling.is_greedy(params) and sampling.is_plain(params):
            token = self._head.token_of(column)
        else:
            adjusted = sampling.adjust(
                self._head.spread(logits),
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
        self._ledger.enter_draft(seq.compute)
        return None
