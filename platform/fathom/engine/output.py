"""What leaves the engine: tokens become final, completions end, outputs are put together."""

from __future__ import annotations

import torch

from fathom.engine import sampling
from fathom.engine.sequence import Sequence
from fathom.ledger import Ledger
from fathom.types import FinishReason, RequestOutput, Token, Usage


def confirm(
    seq: Sequence,
    token: int,
    depth: int,
    logits: torch.Tensor | None,
    ledger: Ledger,
    *,
    shifted: bool = False,
) -> None:
    """Make one token final, and see whether the completion ends with it.

    Args:
        depth: layers that had run when it was decided.
        logits: [vocabulary] that it was chosen from, as the model gave them; None where no
            logprobs are asked for.
        shifted: see ``Decision``.
    """
    params = seq.request.sampling
    logprob = top = None
    if params.logprobs is not None:
        assert logits is not None
        logprob, top = sampling.logprobs_of(logits, token, params.logprobs)
    seq.new_tokens.append(Token(token, depth, logprob, top))
    ledger.enter_token(seq.compute, depth)
    if shifted:
        ledger.enter_load_shift(seq.compute)
    advance(seq, token)


def advance(seq: Sequence, token: int) -> None:
    """Count one more final token, take its text, and see whether the completion ends with it."""
    params = seq.request.sampling
    seq.confirmed += 1
    if token in seq.stop_ids:
        seq.finish_reason = FinishReason.STOP
        seq.stop_reason = token if token in params.stop_token_ids else None
        return
    stop = seq.text.push(token)
    if stop is not None and seq.num_confirmed_output >= params.min_tokens:
        seq.finish_reason, seq.stop_reason = FinishReason.STOP, stop
    elif seq.num_confirmed_output >= seq.max_tokens:
        seq.finish_reason = FinishReason.LENGTH


def take_output(seq: Sequence, *, ended: bool) -> RequestOutput | None:
    """What is new of a completion since the last call; None if nothing is.

    Nothing leaves before the prompt is scored, where that is asked for: in mode ``free`` tokens
    can be final earlier, but who reads them wants the prompt's first.

    Args:
        ended: this is its last output, which carries the reason and the usage.
    """
    if seq.scores is not None and not (seq.scores.complete or ended):
        return None
    text = seq.text.take()
    if not (seq.new_tokens or text or ended):
        return None
    output = RequestOutput(seq.request.request_id, seq.index, seq.new_tokens, text)
    seq.new_tokens = []
    if seq.scores is not None:
        output.prompt_tokens = seq.scores.take()
    if ended:
        output.finish_reason = seq.finish_reason
        output.stop_reason = seq.stop_reason
        output.error = seq.error
        output.retriable = seq.retriable
        output.usage = Usage(
            prompt_tokens=seq.num_prompt,
            completion_tokens=seq.num_confirmed_output,
            cached_tokens=seq.cached_tokens,
            compute=seq.compute,
        )
    return output
