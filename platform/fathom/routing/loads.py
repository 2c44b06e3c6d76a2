"""How many requests each replica has, as well as a router can know without asking."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Iterable

CHOSEN_FOR_S = 1.0
"""A request that was given to a replica counts for so long, until it is sent and counted so."""
REPORT_FOR_S = 10.0
"""A replica's own figure holds for so long: other routers' requests end without our notice."""
SILENT_AFTER_S = 5.0
"""A replica that has answered nothing for so long, though it was asked, is one to avoid."""
_AVOIDED = 1 << 30


class _Replica:
    """One replica. running: requests of ours; others: of other routers, by its last report.
    silent_at: when it will count as silent, if it answers nothing that it was asked.
    """

    __slots__ = (
        "avoid_until",
        "check_at",
        "chosen",
        "load",
        "others",
        "others_until",
        "running",
        "silent",
        "silent_at",
        "version",
    )

    def __init__(self) -> None:
        self.running = self.others = self.load = self.version = 0
        self.others_until = self.avoid_until = self.silent_at = self.check_at = 0.0
        self.silent = False
        self.chosen: deque[float] = deque()  # until when each counts

    def next_check(self) -> float:
        """When something of it expires next; 0 for never."""
        times = [self.others_until, self.avoid_until, 0.0 if self.silent else self.silent_at]
        times += list(self.chosen)[:1]
        return min(filter(None, times), default=0.0)

    def answered(self) -> None:
        """It is alive."""
        self.silent, self.silent_at = False, 0.0


class Loads:
    """Requests under way by replica, with the least loaded at hand. Not thread-safe.

    Nothing here takes time in the number of replicas but ``update``. Times are seconds of any one
    clock that does not go back; what is said of a replica that is not known is ignored.

    Args:
        seed: orders replicas of equal load at the start, so that routers differ; afterwards the
            one that has waited longest is first.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)
        self._replicas: dict[str, _Replica] = {}
        # (load, version, name), with outdated entries; the least load is on top.
        self._order: list[tuple[int, int, str]] = []
        self._versions = itertools.count(1)
        self._checks: list[tuple[float, str]] = []  # when something of a replica expires
        self._total = 0  # of the replicas that are not avoided
        self._avoided = 0

    def __len__(self) -> int:
        return len(self._replicas)

    def __contains__(self, name: str) -> bool:
        return name in self._replicas

    def update(self, names: Iterable[str]) -> list[str]:
        """Know exactly these replicas; new ones have no load.

        Returns:
            Those that are known no more.
        """
        wanted = set(names)
        gone = [name for name in self._replicas if name not in wanted]
        for name in gone:
            self._count(self._replicas.pop(name), -1)
        fresh = sorted(wanted - self._replicas.keys())
        self._random.shuffle(fresh)
        for name in fresh:
            replica = self._replicas[name] = _Replica()
            self._changed(name, replica)
        return gone

    def expire(self, now: float) -> None:
        """Let go of what holds no longer."""
        while self._checks and self._checks[0][0] <= now:
            when, name = heapq.heappop(self._checks)
            replica = self._replicas.get(name)
            if replica is None or replica.check_at != when:
                continue
            replica.check_at = 0.0
            while replica.chosen and replica.chosen[0] <= now:
                replica.chosen.popleft()
            if replica.others_until <= now:
                replica.others, replica.others_until = 0, 0.0
            if replica.avoid_until <= now:
                replica.avoid_until = 0.0
            if replica.silent_at and replica.silent_at <= now:
                replica.silent = True
            self._changed(name, replica)

    def chosen(self, name: str, now: float) -> None:
        """A request is about to be sent."""
        if replica := self._replicas.get(name):
            replica.chosen.append(now + CHOSEN_FOR_S)
            self._changed(name, replica)

    def started(self, name: str, now: float) -> None:
        """A request was sent."""
        if replica := self._replicas.get(name):
            replica.silent_at = replica.silent_at or now + SILENT_AFTER_S
            if replica.chosen:
                replica.chosen.popleft()
            replica.running += 1
            self._changed(name, replica)

    def ended(self, name: str) -> None:
        """A request that was sent is over, however it went."""
        if replica := self._replicas.get(name):
            replica.answered()
            replica.running = max(0, replica.running - 1)
            self._changed(name, replica)

    def reported(self, name: str, requests: int, now: float) -> None:
        """A replica told how many requests it has, from whichever router."""
        if replica := self._replicas.get(name):
            replica.answered()
            replica.others = max(0, requests - replica.running)
            replica.others_until = now + REPORT_FOR_S
            self._changed(name, replica)

    def avoid(self, name: str, until: float) -> None:
        """Take a replica only when there is no other, for a while."""
        if replica := self._replicas.get(name):
            replica.avoid_until = until
            self._changed(name, replica)

    def load(self, name: str) -> int:
        """Requests of a replica; above all real figures while it is to be avoided.

        Raises:
            KeyError: if it is not known.
        """
        return self._replicas[name].load

    def mean(self) -> float:
        """Mean load of the replicas that are not to be avoided; 0 if there are none."""
        return self._total / max(1, len(self._replicas) - self._avoided)

    def least(self, other_than: str = "") -> str:
        """The least loaded replica; of equals the one whose load has not changed for longest.

        Args:
            other_than: a replica that is only returned where it is the only one.

        Raises:
            LookupError: if no replica is known.
        """
        aside = None
        try:
            while self._order:
                _, version, name = self._order[0]
                replica = self._replicas.get(name)
                if replica is None or replica.version != version:
                    heapq.heappop(self._order)
                elif name == other_than and aside is None:
                    aside = heapq.heappop(self._order)
                else:
                    return name
            if aside is None:
                raise LookupError("no replica is known.")
            return aside[2]
        finally:
            if aside is not None:
                heapq.heappush(self._order, aside)

    def _changed(self, name: str, replica: _Replica) -> None:
        """Bring a replica's load, and what is kept of it, up to date."""
        self._count(replica, -1)
        replica.load = replica.running + len(replica.chosen) + replica.others
        if replica.avoid_until or replica.silent:
            replica.load += _AVOIDED
        self._count(replica, +1)
        replica.version = next(self._versions)
        heapq.heappush(self._order, (replica.load, replica.version, name))
        if len(self._order) > 4 * len(self._replicas) + 16:
            self._order = [(r.load, r.version, n) for n, r in self._replicas.items()]
            heapq.heapify(self._order)
        when = replica.next_check()
        if when and (not replica.check_at or when < replica.check_at):
            replica.check_at = when
            heapq.heappush(self._checks, (when, name))

    def _count(self, replica: _Replica, sign: int) -> None:
        if replica.load >= _AVOIDED:
            self._avoided += sign
        else:
            self._total += sign * replica.load
