"""From a request to the sequences that complete it: checks at the door, seeds, limits."""

from __future__ import annotations

import secrets

from fathom.engine.info import EngineInfo
from fathom.engine.resume import check_resumed
from fathom.engine.scoring import PromptScores
from fathom.engine.sequence import Sequence
from fathom.engine.text import DetokenizerFactory, TextStream
from fathom.types import ComputePolicy, InvalidRequest, Request, Resumed

MAX_COMPLETIONS = 128


def check_request(
    request: Request, info: EngineInfo, *, max_rows: int, has_tokenizer: bool
) -> None:
    """Check everything that can be known before a request runs.

    Args:
        max_rows: most rows of one pass; a stack with its last row must fit.

    Raises:
        InvalidRequest: naming the field, its value and the remedy.
    """
    request.sampling.validate()
    request.compute.validate()
    prompt = request.prompt_token_ids
    if not 1 <= request.n <= MAX_COMPLETIONS:
        raise InvalidRequest(f"n must be from 1 to {MAX_COMPLETIONS}, got {request.n}.", param="n")
    if not prompt:
        raise InvalidRequest("the prompt must hold at least one token.", param="prompt")
    known = range(info.vocab_size)
    for name, ids in (
        ("prompt", prompt),
        ("stop_token_ids", request.sampling.stop_token_ids),
        ("logit_bias", tuple(request.sampling.logit_bias)),
    ):
        bad = next((i for i in ids if i not in known), None)
        if bad is not None:
            raise InvalidRequest(
                f"{name}: token id {bad} is not in the vocabulary of {info.vocab_size}.",
                param=name,
            )
    if len(prompt) >= info.max_model_len:
        raise InvalidRequest(
            f"the prompt has {len(prompt)} tokens; the longest that leaves room for an answer "
            f"has {info.max_model_len - 1}.",
            param="prompt",
            code="context_length_exceeded",
        )
    if request.sampling.stop and not has_tokenizer:
        raise InvalidRequest("stop strings need a tokenizer.", param="stop")
    check_stack(request.compute, max_rows)
    if request.resumed:
        check_resumed(request, info)


def check_stack(compute: ComputePolicy, max_rows: int) -> None:
    """Check that a stack with its last row fits into one pass.

    Raises:
        InvalidRequest: if it does not.
    """
    if compute.max_stack >= max_rows:
        raise InvalidRequest(
            f"max_stack must be below max_num_batched_tokens ({max_rows}), got "
            f"{compute.max_stack}.",
            param="max_stack",
        )


def new_sequences(
    request: Request,
    info: EngineInfo,
    first_id: int,
    new_detokenizer: DetokenizerFactory | None,
) -> list[Sequence]:
    """The request's open completions; the first is the parent that the others fork from.

    ``max_tokens`` ends at the longest sequence that the model and the pool allow. A request
    without a seed gets one that no other has. Only completion 0 scores the prompt, before its
    first token; all start at the prompt (see ``resume``).
    """
    params = request.sampling
    seed = secrets.randbits(63) if params.seed is None else params.seed
    eos = () if params.ignore_eos else info.eos_token_ids
    given = request.resumed or (Resumed(),) * request.n
    sequences = [
        Sequence(
            seq_id=first_id + position,
            request=request,
            index=index,
            seed=seed + index,
            max_tokens=min(params.max_tokens, info.max_model_len - len(request.prompt_token_ids)),
            tokens=list(request.prompt_token_ids),
            stop_ids=eos + params.stop_token_ids,
            text=TextStream(new_detokenizer() if new_detokenizer else None, params.stop),
        )
        for position, index in enumerate(i for i in range(request.n) if not given[i].finished)
    ]
    parent, *children = sequences
    if params.prompt_logprobs is not None and parent.index == 0 and not given[0].token_ids:
        parent.scores = PromptScores(
            request.prompt_token_ids, params.prompt_logprobs, info.num_layers
        )
    parent.children = children
    for child in children:
        child.parent = parent
    return sequences
