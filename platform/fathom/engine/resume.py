"""A request that goes on here after the replica that had it was lost.

All that is known of a completion is what somebody has seen: tokens, and at which depth each was
decided. The rest follows from them. Keys, values and text are functions of the tokens. Which rows
were copied (mode ``copy``), how many drafts wait for the deep stage (``free``) and the epoch of the
draws follow from the depths: a draft that stood has the exit's depth, any other token the model's.
So the next token is the one that the lost replica would have given, greedy or drawn.

In the modes that hold drafts back, news comes after flushes alone, when nothing is pending. In
``copy`` drafts are never judged, so it makes no difference when their rows reach the deep stage.
"""

from __future__ import annotations

from collections.abc import Iterable

from fathom.engine.info import EngineInfo
from fathom.engine.output import advance
from fathom.engine.sequence import Decision, Sequence
from fathom.ledger import Ledger
from fathom.types import AcceptMode, InvalidRequest, Request, Resumed


def check_resumed(request: Request, info: EngineInfo) -> None:
    """Check what a request brings along.

    Raises:
        InvalidRequest: naming the field, its value and the remedy.
    """

    def refuse(what: str) -> InvalidRequest:
        return InvalidRequest(f"resumed: {what}", param="resumed")

    if len(request.resumed) != request.n:
        raise refuse(
            f"one entry a completion is needed, {request.n} in all, got {len(request.resumed)}."
        )
    if not request.num_open:
        raise refuse("every completion is finished; there is nothing to go on with.")
    params = request.sampling
    room = min(params.max_tokens, info.max_model_len - len(request.prompt_token_ids))
    stops = () if params.ignore_eos else info.eos_token_ids
    for index, given in enumerate(request.resumed):
        if given.finished:
            continue
        ids, depths = given.token_ids, given.depths
        if len(ids) != len(depths):
            raise refuse(f"completion {index} has {len(ids)} tokens and {len(depths)} depths.")
        if len(ids) > room:
            raise refuse(f"completion {index} has {len(ids)} tokens; at most {room} are asked for.")
        if any(token not in range(info.vocab_size) for token in ids):
            raise refuse(
                f"completion {index} has a token id outside the vocabulary of {info.vocab_size}."
            )
        if any(depth not in range(1, info.num_layers + 1) for depth in depths):
            raise refuse(f"depths must be from 1 to {info.num_layers}, those of {index} are not.")
        if any(token in stops or token in params.stop_token_ids for token in ids[:-1]):
            raise refuse(f"completion {index} goes on past a token that ends it.")


def resume(family: Iterable[Sequence], info: EngineInfo, ledger: Ledger) -> None:
    """Put new completions of a resumed request where the lost replica had left them.

    One whose tokens reach its end gets its ``finish_reason``: the loss came between its last
    token and the news of its end, and there is nothing to run.
    """
    for seq in family:
        given = seq.request.resumed[seq.index]
        ledger.enter_resumption(seq.compute, given.depths)
        for token in given.token_ids:
            seq.tokens.append(token)
            advance(seq, token)
            if seq.finish_reason is not None:
                break
        seq.text.take()  # was shown
        seq.decided = len(seq.tokens) - 1
        seq.epoch = sum(depth >= info.num_layers for depth in given.depths)
        _restore_drafts(seq, given, info.num_layers)


def _restore_drafts(seq: Sequence, given: Resumed, num_layers: int) -> None:
    """Restore what later decisions depend on: which rows were copied, which drafts are pending."""
    compute = seq.request.compute
    exited = [
        Decision(seq.num_prompt - 1 + i, token, float("nan"), resumed=True)
        for i, (token, depth) in enumerate(zip(given.token_ids, given.depths, strict=True))
        if depth < num_layers
    ]
    if compute.copies_states:
        seq.copied = [decision.position for decision in exited]
    if compute.mode is AcceptMode.FREE:
        # Every flush but the last brings a token of the deep stage, so those after it are drafts
        # that none has seen: the stack's cap counts them, and falls where it would have fallen.
        last = max((i for i, depth in enumerate(given.depths) if depth >= num_layers), default=-1)
        first = max(seq.num_prompt + last, len(seq.tokens) - 1 - compute.max_stack)
        seq.pending = [decision for decision in exited if decision.position >= first]
