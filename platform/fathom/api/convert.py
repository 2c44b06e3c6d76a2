"""From the protocol's requests to the engine's: defaults, ranges, tokenization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fathom.api.backend import ModelInfo
from fathom.api.compute import resolve
from fathom.api.prompts import Tokenizer, template_message, tokenize_prompts
from fathom.api.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)
from fathom.tuning.operating_points import OperatingPoints
from fathom.types import (
    ComputePolicy,
    InvalidRequest,
    Request,
    SamplingParams,
)

MAX_N = 128
MAX_STOPS = 64
COMPLETION_MAX_TOKENS = 16  # OpenAI's default


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What requests that do not say get.

    Attributes:
        compute: the compute policy. timeout_s: seconds until a request's deadline.
        points: the operating points that requests can name, if there are any.
    """

    compute: ComputePolicy
    timeout_s: float
    points: OperatingPoints | None = None


def chat_request(
    body: ChatCompletionRequest,
    request_id: str,
    tokenizer: Tokenizer,
    info: ModelInfo,
    defaults: Defaults,
) -> Request:
    """Convert a chat completion request.

    Raises:
        InvalidRequest: naming the field at fault.
    """
    _refuse(body, "tools", "tool_choice", "functions")
    _check_response_format(body.response_format)
    messages = [template_message(i, message) for i, message in enumerate(body.messages)]
    if not messages:
        raise InvalidRequest("messages must not be empty.", param="messages")
    try:
        prompt = tokenizer.apply_chat_template(messages)
    except ValueError as error:
        raise InvalidRequest(
            f"messages do not fit the model's chat template: {error}", param="messages"
        ) from error
    logprobs = None
    if body.logprobs:
        logprobs = body.top_logprobs or 0
    elif body.top_logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true.", param="top_logprobs")
    named = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    return _request(
        body, request_id, prompt, "messages", info, defaults,
        max_tokens=getattr(body, named),
        max_tokens_name=named,
        default_max_tokens=info.max_model_len,
        logprobs=logprobs,
        logprobs_name="top_logprobs",
    )  # fmt: skip


def completion_requests(
    body: CompletionRequest,
    request_id: str,
    tokenizer: Tokenizer,
    info: ModelInfo,
    defaults: Defaults,
) -> list[Request]:
    """Convert a completion request: one engine request for each of its prompts.

    Raises:
        InvalidRequest: naming the field at fault.
    """
    _refuse(body, "suffix")
    _check_response_format(body.response_format)
    if body.best_of is not None and body.best_of > 1:
        raise InvalidRequest("best_of above 1 is not supported; use n.", param="best_of")
    prompt_logprobs = None
    # With echo, logprobs are those of the prompt too, and the prompt alone may be asked for.
    if body.echo and (body.logprobs is not None or body.max_tokens == 0):
        prompt_logprobs = body.logprobs or 0
    return [
        _request(
            body,
            f"{request_id}-{i}",
            ids,
            "prompt",
            info,
            defaults,
            max_tokens=body.max_tokens,
            max_tokens_name="max_tokens",
            default_max_tokens=COMPLETION_MAX_TOKENS,
            logprobs=body.logprobs,
            logprobs_name="logprobs",
            prompt_logprobs=prompt_logprobs,
        )
        for i, ids in enumerate(tokenize_prompts(body.prompt, tokenizer))
    ]


def _request(
    body: GenerationRequest,
    request_id: str,
    prompt: Sequence[int],
    prompt_name: str,
    info: ModelInfo,
    defaults: Defaults,
    *,
    max_tokens: int | None,
    max_tokens_name: str,
    default_max_tokens: int,
    logprobs: int | None,
    logprobs_name: str,
    prompt_logprobs: int | None = None,
) -> Request:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options needs stream to be true.", param="stream_options")
    _check_prompt(prompt, prompt_name, info)
    room = info.max_model_len - len(prompt)
    if max_tokens is None:
        max_tokens = min(default_max_tokens, room)
    elif max_tokens > room:
        raise InvalidRequest(
            f"This model's maximum context length is {info.max_model_len} tokens, but "
            f"{len(prompt)} tokens of {prompt_name} and {max_tokens} of {max_tokens_name} "
            "were requested. Shorten either.",
            param=max_tokens_name,
            code="context_length_exceeded",
        )
    n = 1 if body.n is None else body.n
    if not 1 <= n <= MAX_N:
        raise InvalidRequest(f"n must be an integer from 1 to {MAX_N}, got {n}.", param="n")
    sampling = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=_or(body.min_tokens, 0),
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=0 if body.top_k in (None, -1) else body.top_k,  # vLLM's -1 keeps all
        min_p=_or(body.min_p, 0.0),
        seed=_seed(body.seed),
        stop=_stops(body.stop),
        stop_token_ids=_token_ids("stop_token_ids", body.stop_token_ids or (), info),
        ignore_eos=_or(body.ignore_eos, False),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=_logit_bias(body.logit_bias or {}, info),
    )
    try:
        sampling.validate()
    except InvalidRequest as error:
        # The engine's names for two fields are not the caller's.
        renamed = {"max_tokens": max_tokens_name, "logprobs": logprobs_name}
        name = renamed.get(error.param or "", error.param)
        message = str(error).replace(error.param or name or "", name or "", 1)
        raise InvalidRequest(message, param=name, code=error.code) from error
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        sampling=sampling,
        compute=resolve(body.compute, body.reasoning_effort, defaults.compute, defaults.points),
        n=n,
        timeout_s=defaults.timeout_s,
        cache_salt=body.cache_salt or "",
    )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _check_prompt(prompt: Sequence[int], name: str, info: ModelInfo) -> None:
    if not prompt:
        raise InvalidRequest(f"{name} must not be empty.", param=name)
    if len(prompt) >= info.max_model_len:
        raise InvalidRequest(
            f"This model's maximum context length is {info.max_model_len} tokens, but {name} "
            f"has {len(prompt)}, which leaves no room for a completion. Shorten it.",
            param=name,
            code="context_length_exceeded",
        )
    _token_ids(name, prompt, info)


def _token_ids(name: str, ids: Sequence[int], info: ModelInfo) -> tuple[int, ...]:
    for token in ids:
        if not 0 <= token < info.vocab_size:
            raise InvalidRequest(
                f"{name} holds token id {token}; this model's are 0 to {info.vocab_size - 1}.",
                param=name,
            )
    return tuple(ids)


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(
            f"stop may hold at most {MAX_STOPS} strings, got {len(stops)}.", param="stop"
        )
    return stops


def _seed(seed: int | None) -> int | None:
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise InvalidRequest(f"seed must fit 64 bits, got {seed}.", param="seed")
    return seed


def _logit_bias(bias: dict[str, float], info: ModelInfo) -> dict[int, float]:
    converted: dict[int, float] = {}
    for key, value in bias.items():
        if not key.isascii() or not key.isdigit() or int(key) >= info.vocab_size:
            raise InvalidRequest(
                f"logit_bias: {key!r} is not a token id; this model's are 0 to "
                f"{info.vocab_size - 1}.",
                param="logit_bias",
            )
        converted[int(key)] = value
    return converted


def _refuse(body: GenerationRequest, *names: str) -> None:
    for name in names:
        if getattr(body, name) not in (None, [], "", "none", "auto"):
            raise InvalidRequest(f"{name} is not supported by this server.", param=name)


def _check_response_format(response_format: dict[str, Any] | None) -> None:
    if response_format is not None and response_format.get("type") != "text":
        raise InvalidRequest(
            "response_format: only {'type': 'text'} is supported by this server.",
            param="response_format",
        )
