"""The vocabulary of a request: what is asked, under which compute policy, and what comes back.

These types cross every border (API, engine, replicas), so they hold plain Python values only:
they pickle cheaply and import neither torch nor Ray.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class InvalidRequest(ValueError):
    """A request that cannot be served as asked.

    Attributes:
        param: the request field at fault, in the caller's spelling, or None.
        code: a short machine-readable reason (``context_length_exceeded``, ...), or None.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        # Keyword-only arguments are lost by the default reduction; errors cross process borders.
        return _rebuild_invalid_request, (str(self), self.param, self.code)


def _rebuild_invalid_request(message: str, param: str | None, code: str | None) -> InvalidRequest:
    return InvalidRequest(message, param=param, code=code)


class AcceptMode(StrEnum):
    """What a flush does with drafts that the deep stage disagrees with (free.md)."""

    FULL = "full"  # no drafts: every token runs all layers
    EXACT = "exact"  # drafts are held until verified: the output is the full model's
    ROLLBACK = "rollback"  # drafts are held; kept while -log p_deep(draft) <= rollback_nats
    FREE = "free"  # drafts leave at once and stay (the FREE paper)
    COPY = "copy"  # like free, but deep KV is made from the exit state: CALM's, a baseline


class PolicyName(StrEnum):
    """Which exit policy decides whether a drafted token needs the deep stage now."""

    NEVER = "never"
    ALWAYS = "always"
    THRESHOLD = "threshold"
    FORCED = "forced"


class FinishReason(StrEnum):
    """Why a sequence ended. The first two are OpenAI's; the others name what went wrong."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


def _check_range(name: str, value: float, low: float, high: float, remedy: str) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not ok or not math.isfinite(value) or not low <= value <= high:
        raise InvalidRequest(f"{name} must be {remedy}, got {value!r}.", param=name)


def _check_int(name: str, value: int, low: int, remedy: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise InvalidRequest(f"{name} must be {remedy}, got {value!r}.", param=name)


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
        _check_int("max_tokens", self.max_tokens, fewest, f"an integer of at least {fewest}")
        _check_int("min_tokens", self.min_tokens, 0, "an integer of at least 0")
        if self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), "
                f"got {self.min_tokens}.",
                param="min_tokens",
            )
        _check_range("temperature", self.temperature, 0, 2, "a number in [0, 2]")
        _check_range("top_p", self.top_p, 1e-9, 1, "a number in (0, 1]")
        _check_int("top_k", self.top_k, 0, "an integer of at least 0 (0 keeps all tokens)")
        _check_range("min_p", self.min_p, 0, 1, "a number in [0, 1]")
        _check_range("presence_penalty", self.presence_penalty, -2, 2, "a number in [-2, 2]")
        _check_range("frequency_penalty", self.frequency_penalty, -2, 2, "a number in [-2, 2]")
        _check_range("repetition_penalty", self.repetition_penalty, 1e-3, 1e3, "a number above 0")
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), "an integer")
        for name in ("logprobs", "prompt_logprobs"):
            wanted = getattr(self, name)
            if wanted is None:
                continue
            _check_int(name, wanted, 0, "an integer from 0 to 20")
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
            _check_int("logit_bias", token, 0, "a map from token ids to biases")
            _check_range("logit_bias", bias, -100, 100, "biases in [-100, 100]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputePolicy:
    """How much depth a request's tokens get, and what that may cost in quality.

    Attributes:
        mode: what a flush does with disagreements.
        policy: which exit policy decides; ignored (``never``) in mode ``full``.
        exit_threshold: λ of policy ``threshold``: exit iff confidence > λ, strictly. In [0, 1].
            None takes the mode's default: see ``threshold``.
        forced_exit_rate: probability of an exit a token under policy ``forced``. In [0, 1].
        max_stack: most drafted tokens of a sequence that may wait for the deep stage, >= 1.
        rollback_nats: τ of mode ``rollback``, >= 0 (free.md): a draft is kept while
            -log p_deep(draft) <= τ.
    """

    mode: AcceptMode = AcceptMode.EXACT
    policy: PolicyName = PolicyName.THRESHOLD
    exit_threshold: float | None = None
    forced_exit_rate: float = 0.0
    max_stack: int = 8
    rollback_nats: float = 2.0

    def validate(self) -> None:
        """Check every field.

        Raises:
            InvalidRequest: naming the first field out of range, its value and the remedy.
        """
        for name, kind in (("mode", AcceptMode), ("policy", PolicyName)):
            value = getattr(self, name)
            if value not in list(kind):
                choices = ", ".join(kind)
                raise InvalidRequest(f"{name} must be one of {choices}, got {value!r}.", param=name)
        if self.exit_threshold is not None:
            _check_range("exit_threshold", self.exit_threshold, 0, 1, "a number in [0, 1]")
        _check_range("forced_exit_rate", self.forced_exit_rate, 0, 1, "a number in [0, 1]")
        _check_int("max_stack", self.max_stack, 1, "an integer from 1 to 64")
        if self.max_stack > 64:
            raise InvalidRequest(
                f"max_stack must be an integer from 1 to 64, got {self.max_stack}.",
                param="max_stack",
            )
        _check_range("rollback_nats", self.rollback_nats, 0, 1e3, "a number of at least 0")

    @property
    def drafts(self) -> bool:
        """Whether any token can leave at the exit layer."""
        return self.mode is not AcceptMode.FULL and self.policy is not PolicyName.NEVER

    @property
    def threshold(self) -> float:
        """λ as it applies.

        The request's own, or 0.5 where a wrong draft costs time, 0.9 where it costs quality (FREE
        starts at 0.9).
        """
        if self.exit_threshold is not None:
            return self.exit_threshold
        return 0.5 if self.holds_drafts else 0.9

    @property
    def holds_drafts(self) -> bool:
        """Whether drafted tokens are held back until a flush has verified them."""
        return self.mode in (AcceptMode.EXACT, AcceptMode.ROLLBACK)

    @property
    def copies_states(self) -> bool:
        """Whether the deep layers never run over drafted rows: their keys and values are projected
        from the exit state, as if no layer changed it (CALM, Schuster et al. 2022).
        """
        return self.mode is AcceptMode.COPY


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
    compute: ComputePolicy = ComputePolicy()
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
class ComputeUsage:
    """What a request cost: one request's page of the ledger (see ``fathom.ledger``).

    A *decision row* is a row whose output chooses a token; the others are prefill rows.

    Attributes:
        mode: the accept mode, so that no figure is read without it.
        shallow_layer_tokens, deep_layer_tokens: layer executions x rows at decision rows,
            recomputation and rejected drafts included.
        prefill_layer_tokens: the same for prefill rows.
        exit_head_rows, lm_head_rows: rows that ran through each head.
        flushes: deep passes that this request took part in; flush_rows: its rows in them.
        drafted: tokens proposed by the shallow stage as exits; verified: those a flush has
            looked at; accepted: those it agreed with (in ``free`` they stay either way).
        exited: tokens of the output that were decided at the exit layer.
        decided: tokens of the output, exited or not.
        depth_sum: sum of the output tokens' depths.
        flops: multiply-adds x 2 of everything above, attention and heads included.
        kv_bytes_written, kv_bytes_read: bytes of keys and values.
        preemptions: times this request was recomputed.
        resumptions: times it went on elsewhere because its replica was lost. Tokens from before
            are in ``decided``, ``exited`` and ``depth_sum``, which describe the output; what the
            lost replicas had run for them is lost with their pages, and their drafts are judged
            here without being counted.
    """

    mode: str = ""
    shallow_layer_tokens: int = 0
    deep_layer_tokens: int = 0
    prefill_layer_tokens: int = 0
    exit_head_rows: int = 0
    lm_head_rows: int = 0
    flushes: int = 0
    flush_rows: int = 0
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    exited: int = 0
    decided: int = 0
    depth_sum: int = 0
    flops: int = 0
    kv_bytes_written: int = 0
    kv_bytes_read: int = 0
    preemptions: int = 0
    resumptions: int = 0

    @property
    def layers_per_token(self) -> float:
        """Layer executions an output token, rejected drafts included; prefill left out."""
        return (self.shallow_layer_tokens + self.deep_layer_tokens) / max(self.decided, 1)

    @property
    def mean_depth(self) -> float:
        """Mean depth at which the output's tokens were decided, in layers."""
        return self.depth_sum / max(self.decided, 1)

    @property
    def exit_rate(self) -> float:
        """Share of the output's tokens that were decided at the exit layer."""
        return self.exited / max(self.decided, 1)

    @property
    def acceptance_rate(self) -> float | None:
        """Share of verified drafts that the deep stage agreed with; None without any."""
        return self.accepted / self.verified if self.verified else None


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
