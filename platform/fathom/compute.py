"""How much depth tokens get: what a request may ask for, and what it has cost.

Re-exported by ``fathom.types``, the vocabulary of a request.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from fathom.checks import InvalidRequest, check_int, check_range

_PROBE_RATE = 0.02
"""Of the policies that learn from probes, where a request names none."""


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
    THRESHOLD = "threshold"  # a fixed λ
    FORCED = "forced"  # at random, at a rate: a benchmark's
    ADAPTIVE = "adaptive"  # λ from a mixture of two betas over what flushes say (FREE)
    BUDGET = "budget"  # λ that spends a share of full compute (EERO)
    RISK = "risk"  # λ that is certified to disagree on few tokens (Learn-then-Test)


class Confidence(StrEnum):
    """How sure the exit is of its draft; all are scores in [0, 1], larger is surer."""

    SOFTMAX_GAP = "softmax_gap"  # difference of the two largest probabilities (FREE)
    MAX_PROB = "max_prob"  # the largest probability
    ENTROPY = "entropy"  # 1 - H / log(tokens that the exit head scores)
    SATURATION = "saturation"  # (1 + cosine) / 2 of the exit state with the layer before (CALM)
    META = "meta"  # a trained classifier's probability that the deep stage agrees


_KINDS: dict[str, type[StrEnum]] = {
    "mode": AcceptMode,
    "policy": PolicyName,
    "confidence": Confidence,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputePolicy:
    """How much depth a request's tokens get, and what that may cost in quality.

    Under the policies ``adaptive`` and ``budget`` the threshold follows what this engine has seen,
    so the same request can exit elsewhere at another time. In modes ``full`` and ``exact`` that
    changes its speed alone.

    Attributes:
        mode: what a flush does with disagreements.
        policy: which exit policy decides; ignored (``never``) in mode ``full``.
        exit_threshold: λ of policy ``threshold``: exit iff confidence > λ, strictly. In [0, 1].
            None takes the mode's default: see ``threshold``. Policy ``risk`` carries its certified
            λ here; policy ``budget`` may carry a first guess, used until the engine has seen
            enough.
        forced_exit_rate: probability of an exit a token under policy ``forced``. In [0, 1].
        max_stack: most drafted tokens of a sequence that may wait for the deep stage, >= 1.
        rollback_nats: τ of mode ``rollback``, >= 0 (free.md): a draft is kept while
            -log p_deep(draft) <= τ.
        confidence: the measure that λ is compared with.
        exit_temperature: the exit head's logits are divided by it before the confidence is taken,
            in [0.05, 20]. The draft is the same: it is for calibration.
        budget: of policy ``budget``: mean cost of a token as a share of the full model's, in
            (0, 1], by the depth at which tokens are decided (see ``ComputeUsage``).
        risk: δ of policy ``risk``: share of tokens that may differ from the full model's choice,
            in (0, 1). risk_confidence: 1 - ε, the promise's own probability, in (0, 1).
        probe_rate: share of would-be exits that go to the deep stage all the same, so that a
            policy learns of them without selection bias. In [0, 1]. None takes the policy's own:
            see ``probes``.
        operating_point: name of the point that these settings came from, for the usage; empty for
            none.
        load_aware: whether a server under pressure may take a cheaper point.
    """

    mode: AcceptMode = AcceptMode.EXACT
    policy: PolicyName = PolicyName.THRESHOLD
    exit_threshold: float | None = None
    forced_exit_rate: float = 0.0
    max_stack: int = 8
    rollback_nats: float = 2.0
    confidence: Confidence = Confidence.SOFTMAX_GAP
    exit_temperature: float = 1.0
    budget: float | None = None
    risk: float | None = None
    risk_confidence: float = 0.9
    probe_rate: float | None = None
    operating_point: str = ""
    load_aware: bool = True

    def __post_init__(self) -> None:
        # Files and requests spell them as strings; the engine compares members by identity.
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if value in list(kind):
                object.__setattr__(self, name, kind(value))

    def validate(self) -> None:
        """Check every field.

        Raises:
            InvalidRequest: naming the first field out of range, its value and the remedy.
        """
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if value not in list(kind):
                choices = ", ".join(kind)
                raise InvalidRequest(f"{name} must be one of {choices}, got {value!r}.", param=name)
        for name in ("exit_threshold", "probe_rate"):
            value = getattr(self, name)
            if value is not None:
                check_range(name, value, 0, 1, "a number in [0, 1]")
        check_range("forced_exit_rate", self.forced_exit_rate, 0, 1, "a number in [0, 1]")
        check_int("max_stack", self.max_stack, 1, "an integer from 1 to 64")
        if self.max_stack > 64:
            raise InvalidRequest(
                f"max_stack must be an integer from 1 to 64, got {self.max_stack}.",
                param="max_stack",
            )
        check_range("rollback_nats", self.rollback_nats, 0, 1e3, "a number of at least 0")
        check_range("exit_temperature", self.exit_temperature, 0.05, 20, "a number in [0.05, 20]")
        self._validate_promises()
        for name, kind_of in (("operating_point", str), ("load_aware", bool)):
            value = getattr(self, name)
            if not isinstance(value, kind_of):
                what = {str: "a name", bool: "true or false"}[kind_of]
                raise InvalidRequest(f"{name} must be {what}, got {value!r}.", param=name)

    def _validate_promises(self) -> None:
        """Check what the policies ``budget`` and ``risk`` promise."""
        if self.budget is not None:
            check_range("budget", self.budget, 1e-9, 1, "a share of full compute in (0, 1]")
        elif self.policy is PolicyName.BUDGET:
            raise InvalidRequest(
                "budget must be given with policy budget: a share of full compute in (0, 1].",
                param="budget",
            )
        if self.risk is not None:
            check_range("risk", self.risk, 1e-9, 1 - 1e-9, "a share of tokens in (0, 1)")
        elif self.policy is PolicyName.RISK:
            raise InvalidRequest(
                "risk must be given with policy risk: a share of tokens in (0, 1).", param="risk"
            )
        check_range(
            "risk_confidence", self.risk_confidence, 1e-9, 1 - 1e-9, "a probability in (0, 1)"
        )

    @property
    def drafts(self) -> bool:
        """Whether any token can leave at the exit layer."""
        return self.mode is not AcceptMode.FULL and self.policy is not PolicyName.NEVER

    @property
    def threshold(self) -> float:
        """λ as it applies, where it is fixed.

        The request's own, or 0.5 where a wrong draft costs time, 0.9 where it costs quality (FREE
        starts at 0.9).
        """
        if self.exit_threshold is not None:
            return self.exit_threshold
        return 0.5 if self.holds_drafts else 0.9

    @property
    def probes(self) -> float:
        """Share of would-be exits that are probed: the request's own, or 0.02 under the policies
        ``adaptive`` and ``risk``, which learn from them.
        """
        if not self.drafts:
            return 0.0
        if self.probe_rate is not None:
            return self.probe_rate
        learns = self.policy in (PolicyName.ADAPTIVE, PolicyName.RISK)
        return _PROBE_RATE if learns else 0.0

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
        probes: exits that went to the deep stage all the same, for the policy to learn from.
        requested_budget: what policy ``budget`` was asked for, else None.
        realised_budget: mean cost of the output's tokens as a share of the full model's, by the
            depth at which each was decided: 1, or the share of the exit's layers and head. What
            verifying drafts costs is not in it: see ``layers_per_token``. None without tokens.
        operating_point: the named point that the settings came from, empty for none.
        load_shifted: tokens decided at a cheaper point than asked for, because of load.
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
    probes: int = 0
    requested_budget: float | None = None
    realised_budget: float | None = None
    operating_point: str = ""
    load_shifted: int = 0

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
