"""How many replicas a pool should have, from what its replicas say about their load.

Serve calls a policy every tenth of a second, and applies its answer when it has stayed the same
for the pool's delay. Serve pickles this module by value into its controller: it imports nothing of
Fathom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

REQUESTS = "requests"
"""What a fused or shallow replica records: its requests, running and waiting."""

QUEUE_S = "queue_s"
"""What a deep replica records: seconds that a flush waits before its pass, smoothed."""

BUSY = "busy"
"""What a deep replica records: the share of time in which a pass runs, from 0 to 1."""

CLIENTS = "clients"
"""What a deep replica records: shallow replicas that flush to it."""

_SLACK = 0.1
"""A load this share above the target is left alone."""

_FULL = 0.8
"""A pool shrinks only if what is left would be below this share of its limit."""

_BUSY_LIMIT = 0.8
"""Above this share of busy time, queues grow with every burst."""


def for_requests(requests: Sequence[float], replicas: int, target: float) -> int:
    """Replicas that share their requests so that each has ``target`` of them.

    Args:
        requests: of every replica that has said so. replicas: that there are.
    """
    if not requests:
        return replicas
    total = sum(requests) / len(requests) * replicas
    if total > replicas * target * (1 + _SLACK):
        return math.ceil(total / target)
    fewer = max(1, math.ceil(total / (target * _FULL)))
    return min(replicas, fewer)


def for_queue(
    queue_s: Sequence[float],
    busy: Sequence[float],
    clients: Sequence[float],
    replicas: int,
    target: float,
) -> int:
    """Replicas that hold the time a flush waits at ``target``.

    A queue's length says that there is too little, but not how much: it grows without bound as the
    load nears what can be done. So a pool grows by half, and shrinks by one where the busy time of
    all would leave the others room. A shallow replica flushes to one deep replica: more of these
    than of those would be idle.

    Args:
        queue_s, busy, clients: of every replica that has said so. replicas: that there are.
        target: seconds.
    """
    if not queue_s or not busy:
        return replicas
    waits = sum(queue_s) / len(queue_s)
    if waits > target * (1 + _SLACK):
        useful = max(replicas, math.ceil(sum(clients)))
        return min(useful, replicas + max(1, replicas // 2))
    work = sum(busy) / len(busy) * replicas
    if replicas > 1 and waits < target / 2 and work / (replicas - 1) < _BUSY_LIMIT * _FULL:
        return replicas - 1
    return replicas


class ByRequests:
    """Serve's policy for fused and shallow replicas; see ``for_requests``."""

    def __init__(self, target: float) -> None:
        self._target = target

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Replicas wanted, and no state."""
        requests = _figures(context, REQUESTS)
        return for_requests(requests, context.current_num_replicas, self._target), {}


class ByQueue:
    """Serve's policy for deep replicas; see ``for_queue``."""

    def __init__(self, target: float) -> None:
        self._target = target

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Replicas wanted, and no state."""
        queue_s, busy = _figures(context, QUEUE_S), _figures(context, BUSY)
        clients = _figures(context, CLIENTS)
        return for_queue(queue_s, busy, clients, context.current_num_replicas, self._target), {}


def _figures(context: Any, name: str) -> list[float]:
    return list((context.aggregated_metrics or {}).get(name, {}).values())
