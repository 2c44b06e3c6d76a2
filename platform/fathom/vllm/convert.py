"""From a request to vLLM's sampling parameters, and from vLLM's outputs to tokens.

Imports no vLLM: its objects are read by their attributes, so that this runs, and is tested, where
there is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fathom.engine.info import EngineInfo
from fathom.types import (
    AcceptMode,
    ComputePolicy,
    InvalidRequest,
    Request,
    Resumed,
    Token,
)

_SEEDS = 1 << 63


class Logprob(Protocol):
    """What is read of vLLM's ``Logprob``."""

    logprob: float
    rank: int | None


def check_compute(compute: ComputePolicy) -> None:
    """Check that a policy runs all layers at every token: vLLM knows no other.

    Raises:
        InvalidRequest: naming the field, its value and the remedy.
    """
    compute.validate()
    if compute.mode is not AcceptMode.FULL:
        raise InvalidRequest(
            f"compute.mode must be full on vLLM replicas, which run all layers at every token, got "
            f"{compute.mode.value!r}: leave compute out, or ask a server of topology fused or "
            "disaggregated.",
            param="compute.mode",
        )


def check_resumption(request: Request) -> None:
    """Check that a request that was begun elsewhere can go on here.

    What it had given becomes a part of the prompt, and vLLM counts a prompt's tokens in no
    presence or frequency penalty.

    Raises:
        InvalidRequest: naming the field, its value and the remedy.
    """
    params = request.sampling
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(params, name)
        if value and any(given.token_ids for given in request.resumed):
            raise InvalidRequest(
                f"{name} must be 0 where a request goes on at another vLLM replica, got {value!r}: "
                "vLLM cannot count the tokens from before. Send the request again.",
                param=name,
            )


def sampling_arguments(
    request: Request, index: int, info: EngineInfo, given: Resumed = Resumed()
) -> dict[str, Any]:
    """Arguments of vLLM's ``SamplingParams`` for one completion of a request.

    Tokens that end it are all given by us, those of the model too, and stop strings are looked for
    in our own text, so that an answer ends where those of other replicas end.

    Args:
        index: which completion; its seed is ``seed + index``, as everywhere. A completion that
            goes on draws from another place of the same seed's numbers.
        given: what it had given before; it is in the prompt now.
    """
    params = request.sampling
    done = len(given.token_ids)
    eos = () if params.ignore_eos else info.eos_token_ids
    room = info.max_model_len - len(request.prompt_token_ids)
    wanted = min(params.max_tokens, room) - done
    scores = params.prompt_logprobs if index == 0 and not done else None
    seed = params.seed
    if seed is not None:
        seed = (seed + index + (done << 32)) % _SEEDS
    return {
        # To score alone, it still has to make a token.
        "max_tokens": max(1, wanted),
        "min_tokens": max(0, min(params.min_tokens - done, wanted)),
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "seed": seed,
        "ignore_eos": True,
        "stop_token_ids": list(dict.fromkeys((*eos, *params.stop_token_ids))),
        "logprobs": params.logprobs,
        "prompt_logprobs": scores,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "repetition_penalty": params.repetition_penalty,
        "logit_bias": dict(params.logit_bias) or None,
        "detokenize": False,
    }


def tokens_of(
    ids: Sequence[int],
    logprobs: Sequence[Mapping[int, Logprob]] | None,
    num_top: int | None,
    depth: int,
) -> list[Token]:
    """New tokens of a completion.

    Args:
        ids: of the tokens. logprobs: of each, token id -> vLLM's ``Logprob``, where asked for.
        num_top: alternatives that were asked for; None for no logprobs.
        depth: layers of the model.
    """
    if num_top is None or logprobs is None:
        return [Token(token, depth) for token in ids]
    return [
        scored_token(token, found, num_top, depth)
        for token, found in zip(ids, logprobs, strict=True)
    ]


def scored_token(token: int, found: Mapping[int, Logprob], num_top: int, depth: int) -> Token:
    """A token with its logprob, and the ``num_top`` best alternatives, best first.

    vLLM's mapping holds those and the token itself, whatever its rank.
    """
    best = sorted(
        (each.rank, other, each.logprob)
        for other, each in found.items()
        if each.rank is not None and each.rank <= num_top
    )
    top = {other: logprob for _, other, logprob in best[:num_top]}
    return Token(token, depth, found[token].logprob, top if num_top else None)


def scored_prompt(
    ids: Sequence[int],
    logprobs: Sequence[Mapping[int, Logprob] | None],
    num_top: int,
    depth: int,
) -> list[Token]:
    """A prompt's tokens with their scores; the first has none."""
    return [
        Token(token, depth) if found is None else scored_token(token, found, num_top, depth)
        for token, found in zip(ids, logprobs, strict=True)
    ]
