"""Which deep replicas a shallow replica can flush to, the best first."""

from __future__ import annotations

import hashlib
import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

logger = logging.getLogger("ray.serve")

LONG_QUEUE_S = 0.1
"""A deep replica whose flushes wait longer comes after one on another node that is idle."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_WAITING_S, _BETWEEN_MOVES_S = 0.01, 60.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a deep replica listens, and how it does.

    Attributes:
        address: for an exchange. node: Ray's id of its node.
        free_leases: shallow replicas that it has room for.
        queue_s: seconds that a flush waits for its pass, smoothed.
    """

    address: str
    node: str
    free_leases: int
    queue_s: float


class Breakers:
    """A circuit breaker an address.

    An address that has failed counts as broken for a pause, after which one more try is made. The
    pause doubles with each failure; it is forgotten when the address has served for as long.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._open: dict[str, tuple[float, float]] = {}  # address -> end of the pause, its length

    def failed(self, address: str) -> None:
        """Note that an address could not be reached, or that its connection was lost."""
        with self._lock:
            now = self._clock()
            until, pause = self._open.get(address, (now, _FIRST_PAUSE_S / 2))
            if now - until > pause:
                pause = _FIRST_PAUSE_S / 2
            pause = min(2 * pause, _LONGEST_PAUSE_S)
            self._open[address] = (now + pause, pause)

    def is_broken(self, address: str) -> bool:
        """Whether the address should be tried after all others."""
        with self._lock:
            return self._open.get(address, (0.0, 0.0))[0] > self._clock()

    def keep(self, addresses: Iterable[str]) -> None:
        """Forget the addresses that no longer exist."""
        with self._lock:
            self._open = {each: self._open[each] for each in addresses if each in self._open}


def rank(
    endpoints: Sequence[Endpoint], *, node: str, name: str, is_broken: Callable[[str], bool]
) -> list[str]:
    """Addresses, the one to try first in front.

    Those that fail come last, then those without a free lease, then those with a long queue. Of
    the others, this node's come first, then those with more free leases. What is equal is ordered
    by chance, but always in the same way for one replica: replicas that start together spread.

    Args:
        node: of the replica that asks. name: its own.
    """

    def key(each: Endpoint) -> tuple[bool, bool, bool, bool, int, bytes]:
        chance = hashlib.blake2b(f"{name} {each.address}".encode(), digest_size=8).digest()
        return (
            is_broken(each.address),
            each.free_leases < 1,
            each.queue_s > LONG_QUEUE_S,
            each.node != node,
            -each.free_leases,
            chance,
        )

    return [each.address for each in sorted(endpoints, key=key)]


class Balance:
    """When to leave a deep replica for another: one that was added gets no load otherwise.

    Args:
        clock: seconds. chance: from 0 to 1, new at each call: replicas that see the same must not
            all go at once.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._clock = clock
        self._chance = chance
        self._moved = clock()

    def should_move(self, address: str, ranked: Sequence[str], known: Sequence[Endpoint]) -> bool:
        """Whether to go to the first of ``ranked``.

        Moving costs a rebuild of what is under way, so flushes must wait, the other must have two
        clients fewer (else the two would only change places), and moves are a minute apart.

        Args:
            address: of the deep replica that this one flushes to. ranked: see ``rank``.
            known: the deep replicas, as they last answered.
        """
        leases = {each.address: each.free_leases for each in known}
        own = next((each for each in known if each.address == address), None)
        if own is None or not ranked or ranked[0] == address:
            return False
        if own.queue_s < _WAITING_S or leases[ranked[0]] - own.free_leases < 2:
            return False
        if self._clock() - self._moved < _BETWEEN_MOVES_S or self._chance() > 0.5:
            return False
        self._moved = self._clock()
        return True


class Peers:
    """A list of deep replicas that a thread keeps fresh; calling it returns at once.

    Args:
        ask: who is there now; may take time and may fail, in which case the last answer stands.
        node, name: see ``rank``.
        refresh_s: between two questions.
    """

    def __init__(
        self, ask: Callable[[], Sequence[Endpoint]], *, node: str, name: str, refresh_s: float
    ) -> None:
        self._ask = ask
        self._node = node
        self._name = name
        self._refresh_s = refresh_s
        self._breakers = Breakers()
        self._endpoints: Sequence[Endpoint] = ()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="fathom-peers", daemon=True)
        self._thread.start()

    def __call__(self) -> list[str]:
        """Addresses of deep replicas, the preferred first."""
        return rank(
            self._endpoints,
            node=self._node,
            name=self._name,
            is_broken=self._breakers.is_broken,
        )

    @property
    def endpoints(self) -> Sequence[Endpoint]:
        """Deep replicas, as they last answered."""
        return self._endpoints

    def failed(self, address: str) -> None:
        """Note that a deep replica could not be reached, or was lost."""
        self._breakers.failed(address)

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _loop(self) -> None:
        while not self._closed:
            try:
                found = self._ask()
            except Exception as error:
                # Nobody there yet, or Serve is busy: what was known may still be right.
                logger.debug("deep replicas do not answer: %s", error)
                found = ()
            with self._changed:
                if found:
                    self._endpoints = found
                    self._breakers.keep(each.address for each in found)
                    self._changed.notify_all()
                if not self._closed:
                    self._changed.wait(self._refresh_s)
