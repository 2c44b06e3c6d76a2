"""The requests of the OpenAI protocol, with vLLM's extras and our ``compute`` and ``depths``.

Types are checked strictly here and ranges in ``convert``. Unknown fields are ignored, as vLLM
does, so that clients newer than this server keep working; inside ``compute`` they are refused,
for nobody but this server reads them. ``null`` stands for the default everywhere.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _whole_characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("Text must not hold half a character (a lone surrogate)") from error
    return text


# JSON can spell half of a surrogate pair, which no tokenizer and no response can take.
Text = Annotated[str, AfterValidator(_whole_characters)]


class Model(BaseModel):
    """Strict types, unknown fields ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class StreamOptions(Model):
    """Options of a stream."""

    include_usage: bool | None = Field(
        None, description="Send a last chunk with the usage, its `compute` included."
    )


class ComputeOptions(BaseModel):
    """How much depth this request's tokens get; what is left out keeps the server's setting.

    At most one of ``operating_point``, ``budget`` and ``risk``; see ``api.compute.resolve``.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    operating_point: Text | None = Field(
        None,
        description="Name of measured settings that this server has (`GET /v1/operating_points`); "
        "other fields change them.",
    )
    budget: float | None = Field(
        None,
        description="Spend at most this share of full compute a token, in (0, 1]; `usage` has what "
        "was spent. Implies policy `budget`, and mode `free` where the server's is lossless.",
    )
    risk: float | None = Field(
        None,
        description="Differ from the full model on at most this share of tokens, in (0, 1); "
        "refused where the server's calibration data cannot carry it. Implies policy `risk`, and "
        "mode `free` where the server's is lossless.",
    )
    risk_confidence: float | None = Field(
        None, description="Probability with which the promise of `risk` holds. In (0, 1)."
    )
    mode: Text | None = Field(
        None,
        description="What happens when the deep stage disagrees with a token that left early: "
        "`full` (no early exits), `exact` (same output as `full`), `rollback`, `free`, `copy`.",
    )
    policy: Text | None = Field(
        None,
        description="What decides an exit: `never`, `always`, `threshold`, `forced`, `adaptive` (a "
        "threshold that follows what is seen), `budget`, `risk`.",
    )
    exit_threshold: float | None = Field(
        None,
        description="Exit if the confidence is above this, in [0, 1]. Implies policy `threshold`; "
        "under `adaptive` it is where that begins.",
    )
    confidence: Text | None = Field(
        None,
        description="The measure that is compared: `softmax_gap`, `max_prob`, `entropy`, "
        "`saturation`, or `meta` where a classifier is loaded.",
    )
    exit_temperature: float | None = Field(
        None, description="The exit head's logits are divided by this before. In [0.05, 20]."
    )
    probe_rate: float | None = Field(
        None,
        description="Share of exits that run all layers all the same, to learn from. In [0, 1].",
    )
    load_aware: bool | None = Field(
        None,
        description="Whether a server under pressure may take cheaper settings. Never in modes "
        "`full` and `exact`, nor below a `risk`; `usage.compute.load_shifted` counts the tokens.",
    )
    forced_exit_rate: float | None = Field(
        None, description="Policy `forced`: probability of an exit. In [0, 1]."
    )
    max_stack: int | None = Field(
        None, description="Most tokens that may wait for the deep stage. From 1 to 64."
    )
    rollback_nats: float | None = Field(
        None, description="Mode `rollback`: keep a draft while -log p_deep is at most this."
    )


class GenerationRequest(Model):
    """What chat completions and completions have in common."""

    model: Text
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[Text, float] | None = None
    seed: int | None = None
    stop: Text | list[Text] | None = None
    user: Text | None = None
    # vLLM's extras
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    cache_salt: Text | None = None
    # ours
    compute: ComputeOptions | None = Field(None, description="Depth of this request's tokens.")
    reasoning_effort: Text | None = Field(
        None,
        description="`low`, `medium` or `high`: the operating points `fast`, `balanced` and "
        "`exact`, or the modes `free`, `rollback` and `exact` where there are none. What `compute` "
        "says comes first.",
    )
    depths: bool | None = Field(
        None, description="Report the number of layers behind each token in the choices."
    )


class TextPart(Model):
    """A part of a message; only text is served."""

    type: Text
    text: Text | None = None


class Message(Model):
    """A message of a conversation."""

    role: Text
    content: Text | list[TextPart] | None = None
    name: Text | None = None


class ChatCompletionRequest(GenerationRequest):
    """``POST /v1/chat/completions``."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    # Refused with a clear error when they ask for anything.
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    response_format: dict[Text, Any] | None = None


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``."""

    prompt: Text | list[Text] | list[int] | list[list[int]]
    logprobs: int | None = None
    echo: bool | None = Field(
        None,
        description="Begin the text with the prompt. With `logprobs` its tokens are scored too, by "
        "all layers; `max_tokens` may then be 0.",
    )
    # Refused with a clear error when they ask for anything.
    best_of: int | None = None
    suffix: Text | None = None
    response_format: dict[Text, Any] | None = None
