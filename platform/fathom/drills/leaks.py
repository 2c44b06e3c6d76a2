"""Whether a server that has nothing to do holds nothing any more."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from prometheus_client.parser import text_string_to_metric_families

SETTLE_S = 90.0
"""Longest that a server may take to let go: a dead replica's deadlines have to pass."""

_LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class Held:
    """What is held by nobody's request. All of it is 0 on a server at rest.

    Attributes:
        requests: running or waiting in an engine. kv_caches: stages' pools with blocks in use.
        leases: parts of deep pools beyond one for each live shallow replica.
        objects: in Ray's store beyond what was there at rest before and what the KV store lists.
        streams: that the journal takes for live. unseen: replicas that could not be asked.
    """

    requests: int = 0
    kv_caches: int = 0
    leases: int = 0
    objects: int = 0
    streams: int = 0
    unseen: int = 0

    @property
    def total(self) -> int:
        """Everything together."""
        return sum(asdict(self).values())

    def as_dict(self) -> dict[str, int]:
        """For the report."""
        return asdict(self)


def read_metrics(url: str, key: str = "") -> dict[str, list[float]]:
    """The samples of ``/metrics`` by name, one for each replica (or other set of labels).

    Raises:
        OSError: if the server does not answer.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with urllib.request.urlopen(
        urllib.request.Request(f"{url}/metrics", headers=headers), timeout=30
    ) as answer:
        text = answer.read().decode()
    found: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.value)
    return found


def held_by_engines(metrics: Mapping[str, list[float]]) -> Held:
    """Requests and KV blocks that replicas report."""
    running = metrics.get("fathom_num_requests_running", [])
    waiting = metrics.get("fathom_num_requests_waiting", [])
    usage = metrics.get("fathom_kv_cache_usage_perc", [])
    return Held(
        requests=int(sum(running) + sum(waiting)),
        kv_caches=sum(value > 0 for value in usage),
    )


def settle(look: Callable[[], Held], seconds: float) -> Held:
    """Look until nothing is held, or the time is over; returns what was seen last."""
    deadline = time.monotonic() + seconds
    while True:
        held = look()
        if not held.total or time.monotonic() > deadline:
            return held
        time.sleep(_LOOK_S)
