"""The choice of a replica for a request: its session's, its prefix's, or the least loaded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from time import monotonic
from typing import NamedTuple

from fathom.kvstore.keys import BlockKey, KeyRoot, extend_keys
from fathom.routing.hashing import HashRing
from fathom.routing.loads import Loads
from fathom.routing.prefix_index import PrefixIndex
from fathom.settings import ConfigError, check_at_least
from fathom.types import Request

AVOID_FOR_S = 5.0
"""A replica that could not be reached is left alone for so long."""
_MAX_REMEMBERED = 10_000


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """How requests are spread.

    Attributes:
        step_tokens: a prefix is known in steps of so many tokens; a multiple of the KV block is
            best. Prompts that are shorter go to the least loaded replica.
        max_prefixes: steps of prompts that are remembered, about 200 bytes each, in each ingress.
        slack: requests that a replica may have more than the least loaded one (for a session:
            than the mean) and still get the requests whose prefix or session it has.
        ratio: the same relative to that load, at least 1; the larger of the two counts.
        ring_points: of each replica on the ring of sessions.
    """

    step_tokens: int = 32
    max_prefixes: int = 200_000
    slack: int = 8
    ratio: float = 1.5
    ring_points: int = 64

    def validate(self) -> None:
        """Check every field.

        Raises:
            ConfigError: naming the first field out of range, its value and the remedy.
        """
        for name, low in (
            ("step_tokens", 1),
            ("max_prefixes", 1),
            ("slack", 0),
            ("ring_points", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(f"{name} must be an integer of at least {low}, got {value!r}.")
        check_at_least(self, ("ratio",), 1)


class Reason(StrEnum):
    """Why a replica was chosen."""

    SESSION = "session"
    PREFIX = "prefix"
    LOAD = "load"


class Choice(NamedTuple):
    """A replica for a request. matched_tokens: of the prompt, served by it before."""

    replica: str
    reason: Reason
    matched_tokens: int = 0


class RoutingPolicy:
    """Chooses at once, from what it was told; asks nobody. Not thread-safe.

    A session's replica follows from consistent hashing alone, so all routers agree on it; if that
    replica has more requests than the mean allows, the next one on the ring gets the request.
    Other requests go to a replica that has served the longest prefix of the prompt. What load it
    may have beyond the least loaded one shrinks with the part of the prompt that it knows: a whole
    prompt is worth some waiting, a common system prompt in front of it decides among equals only.

    Args:
        seed: see ``Loads``.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        config: RoutingConfig = RoutingConfig(),
        *,
        seed: int | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._config = config
        self._clock = clock
        self._ring = HashRing(config.ring_points)
        self._index = PrefixIndex(config.max_prefixes)
        self._loads = Loads(seed)
        # Whom a request was given to, for the case that it comes back to go on elsewhere.
        self._last: OrderedDict[str, str] = OrderedDict()

    def update(self, replicas: Iterable[str]) -> None:
        """Choose among exactly these replicas from now on; those that are gone are forgotten."""
        names = list(replicas)
        self._ring.update(names)
        for name in self._loads.update(names):
            self._index.forget(name)

    def started(self, replica: str) -> None:
        """A request was sent to a replica."""
        self._loads.started(replica, self._clock())

    def ended(self, replica: str) -> None:
        """A request that was sent to it is over, however it went."""
        self._loads.ended(replica)

    def reported(self, replica: str, requests: int) -> None:
        """A replica told how many requests it has, those of other routers included."""
        self._loads.reported(replica, requests, self._clock())

    def unreachable(self, replica: str) -> None:
        """A replica could not be reached: leave it alone for a while."""
        self._loads.avoid(replica, self._clock() + AVOID_FOR_S)

    def choose(self, request: Request | None) -> Choice:
        """Choose a replica, and count on the request being sent to it.

        Args:
            request: None for a call that is no request: the least loaded replica will do.

        Raises:
            LookupError: if there is no replica.
        """
        now = self._clock()
        self._loads.expire(now)
        if request is None:
            choice = Choice(self._loads.least(), Reason.LOAD)
        else:
            # One that goes on after a loss is not given to where it was lost.
            lost = self._last.get(request.request_id, "") if request.resumed else ""
            keys = self._keys(request)
            if request.session_id:
                choice = self._of_session(request.session_id, lost)
            else:
                choice = self._of_prefix(keys, lost)
            self._index.record(keys, choice.replica)
            self._remember(request.request_id, choice.replica)
        self._loads.chosen(choice.replica, now)
        return choice

    def _keys(self, request: Request) -> list[BlockKey]:
        # Chains as in the KV store. What else their root names is the same for all replicas.
        keys: list[BlockKey] = []
        root = KeyRoot("", "", 0, 0, "", request.cache_salt)
        extend_keys(keys, root, request.prompt_token_ids, self._config.step_tokens)
        return keys

    def _of_session(self, session_id: str, lost: str) -> Choice:
        limit = self._limit(self._loads.mean())
        for name in self._ring.walk(session_id):
            if name != lost and self._loads.load(name) <= limit:
                return Choice(name, Reason.SESSION)
        # All are avoided, or there is only the one that lost it.
        return Choice(self._loads.least(lost), Reason.LOAD)

    def _of_prefix(self, keys: list[BlockKey], lost: str) -> Choice:
        least = self._loads.least(lost)
        base = self._loads.load(least)
        room = self._limit(base) - base
        for depth, names in self._index.holders(keys):
            known = [name for name in names if name in self._loads and name != lost]
            if not known:
                continue
            best = min(known, key=self._loads.load)
            if self._loads.load(best) <= base + room * depth / len(keys):
                return Choice(best, Reason.PREFIX, depth * self._config.step_tokens)
        return Choice(least, Reason.LOAD)

    def _limit(self, base: float) -> float:
        return base + max(self._config.slack, (self._config.ratio - 1) * base)

    def _remember(self, request_id: str, replica: str) -> None:
        self._last[request_id] = replica
        self._last.move_to_end(request_id)
        if len(self._last) > _MAX_REMEMBERED:
            self._last.popitem(last=False)
