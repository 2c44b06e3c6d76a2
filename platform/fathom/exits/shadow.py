"""Shadow mode: of a share of the completions, what the full model says of every token.

In the modes ``free``, ``rollback`` and ``exact`` a flush takes every row through the deep stage
anyway, so the shadow only notes what it says. A pause of drafting in ``exact`` hides the exit
head's rows; a completion in the shadow drafts all the same, which costs it time and changes no
token. In ``copy`` no flush looks at a row that left: the text is scored at full depth once it has
ended (``Unread``). So the shadow never changes what a request is answered.
"""

from __future__ import annotations

import math
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from fathom.settings import ConfigError, check_above_zero
from fathom.types import ComputePolicy, Confidence

BINS = 64
"""Of a completion's confidences, by ``histogram.edges``: every other edge of a points file."""

_PER_RADIAN = 2 * BINS / math.pi
_MOST_KEPT = 4096
"""Completions that wait to be told of. When nobody asks for them, the oldest are dropped."""


@dataclass(frozen=True, kw_only=True)
class ShadowConfig:
    """How live traffic is watched.

    Attributes:
        rate: share of the completions that are, in [0, 1]; 0 watches none.
        every_s: seconds between two entries in MLflow, above 0.
        false_alarms: probability, in (0, 1), with which a watch of one operating point ever raises
            an alarm while nothing has changed; see ``exits.drift``.
    """

    rate: float = 0.0
    every_s: float = 60.0
    false_alarms: float = 0.05

    def validate(self, where: str = "") -> None:
        """Check every field.

        Raises:
            ConfigError: naming the first field out of range, its value and the remedy.
        """
        if not _is_number(self.rate) or not 0 <= self.rate <= 1:
            raise ConfigError(
                f"{where}rate must be a share of the completions in [0, 1], got {self.rate!r}."
            )
        check_above_zero(self, ("every_s",), where)
        if not _is_number(self.false_alarms) or not 0 < self.false_alarms < 1:
            raise ConfigError(
                f"{where}false_alarms must be a probability in (0, 1), got {self.false_alarms!r}."
            )


@dataclass(frozen=True, slots=True)
class Unread:
    """The text of a completion whose rows no flush has looked at.

    Attributes:
        tokens: prompt and output. copied: ascending positions of the rows that left; the row at p
            has chosen the token at p + 1.
    """

    tokens: tuple[int, ...]
    copied: tuple[int, ...]


@dataclass(slots=True)
class Shadowed:
    """One completion, as it is told of. Plain values: it crosses processes.

    Attributes:
        point: operating point that its settings came from, or empty.
        compute: its settings.
        asked: rows at which the exit head spoke. decided: tokens of the output.
        exited: tokens of the output that were decided at the exit.
        wrong: rows whose draft stands in the output and at which the head's best token is not the
            full model's, after the same text.
        layer_tokens: layer executions x rows at decision rows, rejected drafts included.
        check_layer_tokens: the same for what was run only to check it; 0 where flushes tell.
        rows, agreed: [BINS] rows by confidence, and those of them at which the head's best token
            is the full model's; in mode ``copy`` that is not told by confidence.
        unread: what is to be scored before ``wrong`` is known, else None.
    """

    point: str
    compute: ComputePolicy
    asked: int = 0
    decided: int = 0
    exited: int = 0
    wrong: int = 0
    layer_tokens: int = 0
    check_layer_tokens: int = 0
    rows: list[int] = field(default_factory=lambda: [0] * BINS)
    agreed: list[int] = field(default_factory=lambda: [0] * BINS)
    unread: Unread | None = None

    def settle(self, best: Sequence[int | None], layer_tokens: int) -> None:
        """Take in what the full model says of an unread text.

        Args:
            best: of each position of the text, the full model's choice there; None where it was
                not asked, which counts as right.
            layer_tokens: what asking it has cost.
        """
        assert self.unread is not None
        tokens, copied = self.unread.tokens, self.unread.copied
        self.wrong = sum(best[p + 1] not in (None, tokens[p + 1]) for p in copied)
        self.check_layer_tokens += layer_tokens
        self.unread = None


class Notes:
    """What is noted of one completion under way."""

    __slots__ = ("agreed", "asked", "rows", "wrong")

    def __init__(self) -> None:
        self.asked = 0
        self.wrong = 0
        self.rows = [0] * BINS
        self.agreed = [0] * BINS

    def row(self, confidence: float, *, agrees: bool | None, stands: bool) -> None:
        """Note one row of the exit head.

        Args:
            confidence: in [0, 1]; one that is not a number is passed over.
            agrees: whether the head's best token is the full model's; None where nobody looked.
            stands: whether the row's draft is in the output.
        """
        if confidence != confidence:
            return
        self.asked += 1
        root = math.sqrt(min(max(confidence, 0.0), 1.0))
        place = min(int(math.asin(root) * _PER_RADIAN), BINS - 1)
        self.rows[place] += 1
        if agrees:
            self.agreed[place] += 1
        elif stands and agrees is not None:
            self.wrong += 1


class ShadowLog:
    """The completions of one engine that are in the shadow. One thread fills it, another drains it.

    Args:
        rate: see ``ShadowConfig``.

    Attributes:
        dropped: completions that were forgotten because nobody has asked for them.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._ended: deque[Shadowed] = deque()
        self.dropped = 0

    def picks(self, request_id: str, index: int, compute: ComputePolicy) -> bool:
        """Whether a completion is in the shadow.

        By its request's id and not its seed, which many requests may have in common.
        """
        if not compute.drafts:
            return False
        return zlib.crc32(f"{request_id}/{index}".encode()) < self._rate * 2**32

    def add(self, completion: Shadowed) -> None:
        """Keep a completion that has ended."""
        if len(self._ended) >= _MOST_KEPT:
            self._ended.popleft()
            self.dropped += 1
        self._ended.append(completion)

    def drain(self) -> list[Shadowed]:
        """The completions that have ended since the last call, in order."""
        return [self._ended.popleft() for _ in range(len(self._ended))]


def measure_name(confidence: Confidence, temperature: float) -> str:
    """Name of a measure of confidence at a temperature."""
    return confidence.value if temperature == 1 else f"{confidence.value}@{temperature!r}"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
