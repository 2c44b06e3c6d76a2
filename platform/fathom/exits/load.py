"""Under pressure: when an engine takes cheaper settings than it was asked for, and which.

*When*: a level, 0 where all is well, that rises by one while the engine is short of something for
long enough, and falls again while it is short of nothing for longer (``LoadLevel``).

*Which*: at level n a request gets what is n times cheaper than what it asked for (``Ladder``).
*Cheaper* is, in this order:

1. the next operating point: of those with the same accept mode, measure of confidence,
   temperature, stack and tolerance, the dearest that was measured to spend less compute than the
   one at hand. A point's own threshold or budget is taken, nothing else of it;
2. a step: a budget is lowered by 0.1, down to the least that is possible; a threshold λ becomes λ²,
   which near 1 allows twice the doubt (1 - λ), and never leaves [0, 1].

Some requests get what they asked for, however great the pressure: those in mode ``full`` or
``exact``, whose output is the full model's whatever exits; those of policy ``risk``, whose
threshold is the lowest that is certified; those of ``never``, ``always`` and ``forced``, which say
exactly what they want; and those that say ``load_aware: false``.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fathom.compute import AcceptMode, ComputePolicy, PolicyName
from fathom.settings import ConfigError, check_above_zero

BUDGET_STEP = 0.1
LadderPoints = Sequence[tuple[ComputePolicy, float]]
"""Compute policies, and the share of full compute that each was measured to spend."""
_MODES = (AcceptMode.ROLLBACK, AcceptMode.FREE, AcceptMode.COPY)
_POLICIES = (PolicyName.THRESHOLD, PolicyName.ADAPTIVE, PolicyName.BUDGET)
_REMEMBERED = 256


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """When cheaper settings are taken.

    Attributes:
        enabled: whether they ever are.
        waiting: requests that wait for admission, queue_s: seconds that the first of them has
            waited, and kv_usage: share of KV blocks in use, in (0, 1], of which any is pressure.
        relax: share of these below which all of them must be for the pressure to be off, in
            (0, 1); between the two the level stays.
        rise_s, fall_s: seconds for which there must be pressure, or none, before the level
            changes by one.
        most: the highest level.
    """

    enabled: bool = False
    waiting: int = 4
    queue_s: float = 1.0
    kv_usage: float = 0.95
    relax: float = 0.5
    rise_s: float = 1.0
    fall_s: float = 5.0
    most: int = 3

    def validate(self, where: str = "") -> None:
        """Check every field.

        Raises:
            ConfigError: naming the first field out of range, its value and the remedy.
        """
        if not isinstance(self.enabled, bool):
            raise ConfigError(f"{where}enabled must be true or false, got {self.enabled!r}.")
        for name in ("waiting", "most"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{where}{name} must be an integer of at least 1, got {value!r}.")
        check_above_zero(self, ("queue_s", "kv_usage", "relax", "rise_s", "fall_s"), where)
        for name in ("kv_usage", "relax"):
            if getattr(self, name) > 1:
                raise ConfigError(f"{where}{name} must be at most 1, got {getattr(self, name)!r}.")
        if self.relax == 1:
            raise ConfigError(f"{where}relax must be below 1, or the level goes to and fro, got 1.")


@dataclass(frozen=True, slots=True)
class Pressure:
    """What an engine is short of now: see ``LoadConfig``."""

    waiting: int = 0
    queue_s: float = 0.0
    kv_usage: float = 0.0


class LoadLevel:
    """How far an engine is from what its requests asked for.

    Attributes:
        level: from 0 to ``most``.
    """

    def __init__(self, config: LoadConfig) -> None:
        self.level = 0
        self._config = config
        self._high_since: float | None = None
        self._low_since: float | None = None

    def update(self, pressure: Pressure, now: float) -> int:
        """Take in the pressure of this moment; returns the level.

        Between two calls the pressure is taken to be as at the first of them. It takes one call to
        rise a level, however long ago the last one was; to fall, the time is enough.

        Args:
            now: seconds, never less than before.
        """
        config = self._config
        share = max(
            pressure.waiting / config.waiting,
            pressure.queue_s / config.queue_s,
            pressure.kv_usage / config.kv_usage,
        )
        if share < 1:
            self._high_since = None
        if share > config.relax:
            self._low_since = None
        if share >= 1:
            if self._high_since is None:
                self._high_since = now
            elif now - self._high_since >= config.rise_s and self.level < config.most:
                self.level += 1
                self._high_since = now
        elif share <= config.relax:
            if self._low_since is None:
                self._low_since = now
            while self.level and now - self._low_since >= config.fall_s:
                self.level -= 1
                self._low_since += config.fall_s
        return self.level


@dataclass(frozen=True, slots=True)
class Rung:
    """What a request gets at a level.

    Attributes:
        compute: the policy that decides.
        power: to which a threshold that follows what is seen is raised (policy ``adaptive``).
        steps: how many times cheaper it is than what was asked for.
    """

    compute: ComputePolicy
    power: float = 1.0
    steps: int = 0

    def lower(self, threshold: float | None) -> float | None:
        """λ of this rung, where it is not the policy's own."""
        if threshold is None or self.power == 1:
            return threshold
        return max(threshold, 0.0) ** self.power


class Ladder:
    """Cheaper and cheaper settings for each request.

    Args:
        least_budget: the least possible budget of a policy, by its stack.
    """

    def __init__(
        self,
        points: LadderPoints = (),
        least_budget: Callable[[ComputePolicy], float] = lambda _: 0.0,
    ) -> None:
        self._points = sorted(
            ((c, cost) for c, cost in points if c.policy in _POLICIES), key=lambda each: -each[1]
        )
        self._least_budget = least_budget

    def has(self, compute: ComputePolicy) -> bool:
        """Whether a policy is one of the points."""
        return any(_alike(each, compute) for each, _ in self._points)

    def down(self, compute: ComputePolicy, steps: int) -> Rung:
        """What is so many times cheaper than ``compute``, or as many times as there is."""
        rung = Rung(compute)
        if not may_shift(compute):
            return rung
        for _ in range(steps):
            found = self._next_point(rung) or self._step(rung)
            if found is None:
                break
            rung = found
        return rung

    def _next_point(self, rung: Rung) -> Rung | None:
        compute = rung.compute
        if rung.power != 1:
            return None
        own = next((cost for each, cost in self._points if _alike(each, compute)), None)
        if own is None:
            return None
        for each, cost in self._points:  # the dearest first
            if cost < own and _family(each) == _family(compute):
                taken = {
                    name: getattr(each, name) for name in ("policy", "exit_threshold", "budget")
                }
                return Rung(dataclasses.replace(compute, **taken), steps=rung.steps + 1)
        return None

    def _step(self, rung: Rung) -> Rung | None:
        compute, steps = rung.compute, rung.steps + 1
        if compute.policy is PolicyName.ADAPTIVE:
            return Rung(compute, rung.power * 2, steps)
        if compute.policy is PolicyName.THRESHOLD:
            lower = compute.threshold**2
            if lower == compute.threshold:
                return None
            return Rung(dataclasses.replace(compute, exit_threshold=lower), steps=steps)
        assert compute.budget is not None
        budget = max(compute.budget - BUDGET_STEP, self._least_budget(compute))
        if budget >= compute.budget:
            return None
        return Rung(dataclasses.replace(compute, budget=budget), steps=steps)


class LoadShift:
    """The level and the ladder of one engine. Owned by one thread.

    Args:
        clock: seconds.

    Attributes:
        enabled: whether it ever shifts anything.
    """

    def __init__(
        self,
        config: LoadConfig,
        ladder: Ladder | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.enabled = config.enabled
        self._level = LoadLevel(config)
        # Where to look: other points may come while requests run that asked for the old ones.
        self._ladders: tuple[Ladder, ...] = (ladder or Ladder(),)
        self._clock = clock
        self._rungs: dict[ComputePolicy, Rung | None] = {}

    @property
    def level(self) -> int:
        """From 0, where every request gets what it asked for."""
        return self._level.level

    def take(self, ladder: Ladder) -> None:
        """Look at another ladder, and at the last one for what is a point of that one alone."""
        self._ladders = (ladder, self._ladders[0])
        self._rungs.clear()

    def update(self, pressure: Pressure) -> None:
        """Take in the pressure of this moment."""
        before = self.level
        if self._level.update(pressure, self._clock()) != before:
            self._rungs.clear()

    def rung(self, compute: ComputePolicy) -> Rung | None:
        """What a request gets now; None where that is what it asked for."""
        if not self.level or not may_shift(compute):
            return None
        if compute not in self._rungs:
            if len(self._rungs) >= _REMEMBERED:
                self._rungs.clear()
            ladders = self._ladders
            ladder = next((each for each in ladders if each.has(compute)), ladders[0])
            found = ladder.down(compute, self.level)
            self._rungs[compute] = found if found.steps else None
        return self._rungs[compute]


def may_shift(compute: ComputePolicy) -> bool:
    """Whether a request may get less than it asked for."""
    return compute.load_aware and compute.mode in _MODES and compute.policy in _POLICIES


def _family(compute: ComputePolicy) -> tuple[object, ...]:
    """What must be equal for one policy's threshold to make sense in another's place."""
    return (
        compute.mode,
        compute.confidence,
        compute.exit_temperature,
        compute.max_stack,
        compute.rollback_nats,
    )


def _alike(point: ComputePolicy, compute: ComputePolicy) -> bool:
    """Whether a policy spends what the point was measured to spend."""
    return (
        _family(point) == _family(compute)
        and point.policy == compute.policy
        and point.threshold == compute.threshold
        and point.budget == compute.budget
    )
