"""The vocabulary of a request: what is asked, under which compute policy, and what comes back.

These types cross every border (API, engine, replicas), so they hold plain Python values only:
they pickle cheaply and import neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from fathom.checks import InvalidRequest, check_int, check_range
from fathom.compute import AcceptMode, ComputePolicy, ComputeUsage, Confidence, PolicyName

__all__ = [
    "AcceptMode",
    "ComputePolicy",
    "ComputeUsage",
    "Confidence",
    "FinishReason",
    "InvalidRequest",
    "PolicyName",
    "Request",
    "RequestOutput",
    "Resumed",
    "SamplingParams",
    "Token",
    "Usage",
]


class FinishReason(StrEnum):
    """Why a sequence ended. The first two are OpenAI's; the others name what went wrong."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen from logits, and when generation stops.

    The defaults are greedy decoding of 16 tokens. Penalties and bias follow OpenAI's definitions
    (``repetition_penalty`` follows transformers'), ``min_p`` follows vLLM's.

    Attributes:
        max_tokens: most tokens to generate, >= 1; 0 with ``prompt_logprobs``, to score alone.
        min_tokens: EOS and stop token ids are masked until this many tokens exist.
        temperature: 0 is greedy; otherwise logits are divided by it. In [0, 2].
        top_p: nucleus mass in (0, 1]. top_k: keep the k best, 0 keeps all. min_p: keep tokens
            with at least min_p times the best probability, in [0, 1].
        seed: makes sampling reproducible; the draws depend on it and on token positions only,
            never on the batch.
        stop: strings that end generation; not part of the text returned.
        stop_token_ids: token ids that end generation, beside the model's EOS.
        ignore_eos: keep going past EOS.
        logprobs: number of top alternatives to report a token (0 reports the chosen token only);
            None reports none.
        prompt_logprobs: number of top alternatives to report at every prompt position (0 reports
            the prompt's own tokens only); None does not score the prompt. See
            ``RequestOutput.prompt_tokens``.
        presence_penalty, frequency_penalty: in [-2, 2], over generated tokens.
        repetition_penalty: > 0, over prompt and generated tokens; 1 is off.
        logit_bias: added to the logits, token id -> bias in [-100, 100].
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def validate(self) -> None:
        """Check every field.

        Raises:
            InvalidRequest: naming the first field out of range, its value and the remedy.
        """
        fewest = 1 if self.prompt_logprobs is None else 0
        check_int("max_tokens", self.max_tokens, fewest, f"an integer of at least {fewest}")
        check_int("min_tokens", self.min_tokens, 0, "an integer of at least 0")
        if self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), "
                f"got {self.min_tokens}.",
                param="min_tokens",
            )
        check_range("temperature", self.temperature, 0, 2, "a number in [0, 2]")
        check_range("top_p", self.top_p, 1e-9, 1, "a number in (0, 1]")
        check_int("top_k", self.top_k, 0, "an integer of at least 0 (0 keeps all tokens)")
        check_range("min_p", self.min_p, 0, 1, "a number in [0, 1]")
        check_range("presence_penalty", self.presence_penalty, -2, 2, "a number in [-2, 2]")
        check_range("frequency_penalty", self.frequency_penalty, -2, 2, "a number in [-2, 2]")
        check_range("repetition_penalty", self.repetition_penalty, 1e-3, 1e3, "a number above 0")
        if self.seed is not None:
            check_int("seed", self.seed, -(2**63), "an integer")
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(self, name)
            if wanted is None:
                continue
            check_int(name, wanted, 0, "an integer from 0 to 20")
            if wanted > 20:
                raise InvalidRequest(
                    f"{name} must be an integer from 0 to 20, got {wanted}.", param=name
                )
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise InvalidRequest(
                    f"stop must hold non-empty strings, got {text!r}.", param="stop"
                )
        for token, bias in self.logit_bias.items():
            check_int("logit_bias", token, 0, "a map from token ids to biases")
            check_range("logit_bias", bias, -100, 100, "biases in [-100, 100]")


@dataclass(frozen=True, slots=True)
class Resumed:
    """What one completion of a request had given before its replica was lost.

    Attributes:
        token_ids: final tokens that somebody has seen, in order, up to the end of some
            ``RequestOutput``. depths: of each, in layers (see ``Token.depth``).
        finished: nothing more of it is wanted.
    """

    token_ids: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    finished: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to complete.

    Attributes:
        request_id: unique among live requests.
        prompt_token_ids: at least one token id.
        n: completions wanted; each shares the prompt's KV blocks and has seed ``seed + index``.
        timeout_s: seconds from admission to the engine after which the request ends with
            ``finish_reason`` ``deadline``; None waits for ever.
        cache_salt: keeps this request's KV blocks apart from those of other salts.
        session_id: requests of one session go to one replica where that can be; empty for none.
        resumed: one entry a completion where the request goes on after a loss, else empty.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    compute: ComputePolicy = field(default_factory=ComputePolicy)
    n: int = 1
    timeout_s: float | None = None
    cache_salt: str = ""
    session_id: str = ""
    resumed: tuple[Resumed, ...] = ()

    @property
    def num_open(self) -> int:
        """Completions that are wanted still."""
        return self.n - sum(given.finished for given in self.resumed)


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token, or one of a prompt that was scored.

    Attributes:
        id: vocabulary index.
        depth: layers that had run when the token was decided: the exit layer k for a draft that
            was kept, the number of layers L otherwise.
        logprob: natural log of its probability under the distribution it was drawn from
            (temperature and filters not applied), when asked for. Modes ``full``, ``exact`` and
            ``rollback`` report the full model's; ``free`` reports the exit head's for drafts.
            A prompt's tokens have the full model's in every mode, the first has none.
        top_logprobs: the best alternatives, token id -> logprob, best first.
    """

    id: int
    depth: int
    logprob: float | None = None
    top_logprobs: Mapping[int, float] | None = None


@dataclass(slots=True)
class Usage:
    """Token counts of one completion, with its compute.

    Attributes:
        cached_tokens: prompt tokens whose KV blocks came from the prefix cache.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    compute: ComputeUsage = field(default_factory=ComputeUsage)


@dataclass(slots=True)
class RequestOutput:
    """News of one completion of a request: new confirmed tokens and text, perhaps its end.

    Attributes:
        index: which of the request's ``n`` completions.
        prompt_tokens: the prompt, scored, one token each, at full depth whatever the mode; set
            where ``prompt_logprobs`` asks for it, once, on the first output of completion 0.
            None if that completion was cut short before.
        tokens: newly confirmed tokens, in order. text: the new text that is safe to show (text
            that may be the start of a stop string is held back).
        finish_reason: set on the last output of a completion, else None.
        stop_reason: the stop string or token id that ended it, if one did.
        error: what went wrong when finish_reason is ``error`` or ``deadline``.
        retriable: the error is this replica's plight and no fault of the request, which can go on
            at another (``Request.resumed``).
        usage: set on the last output.
    """

    request_id: str
    index: int = 0
    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    retriable: bool = False
    usage: Usage | None = None
    prompt_tokens: list[Token] | None = None
