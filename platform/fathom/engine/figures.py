"""What an engine tells of itself: figures under the names of the metrics."""

from __future__ import annotations

import time

from fathom.engine.deep import DeepStage
from fathom.engine.scheduler import Scheduler
from fathom.exits.load import Pressure
from fathom.ledger import Ledger


def pressure(scheduler: Scheduler, deep: DeepStage) -> Pressure:
    """What the engine is short of now. Who was preempted has waited before, and does not count."""
    first = next((seq for seq in scheduler.waiting if not seq.num_confirmed_output), None)
    return Pressure(
        waiting=len(scheduler.waiting),
        queue_s=0.0 if first is None else time.monotonic() - first.added_at,
        kv_usage=_kv_usage(scheduler, deep),
    )


def _kv_usage(scheduler: Scheduler, deep: DeepStage) -> float:
    caches = (scheduler.shallow_cache, deep.cache)
    return max(1 - c.num_available_blocks / c.num_usable_blocks for c in caches)


def figures(scheduler: Scheduler, deep: DeepStage, ledger: Ledger) -> dict[str, float]:
    """Figures of this moment, and totals since the engine's start."""
    total, shared = ledger.total, scheduler.shared
    live = (*scheduler.running, *scheduler.waiting)
    unforked = sum(len(seq.children) for seq in live)
    return {
        "num_requests_running": len(scheduler.running),
        "num_requests_waiting": len(scheduler.waiting) + unforked,
        "kv_cache_usage_perc": _kv_usage(scheduler, deep),
        "prefix_cache_queries": scheduler.prefix_queries,
        "prefix_cache_hits": scheduler.prefix_hits,
        "kv_store_hits": 0 if shared is None else shared.tokens,
        "num_preemptions": total.preemptions,
        "exit_rate": total.exit_rate,
        "acceptance_rate": total.acceptance_rate or 0.0,
        "layers_per_token": total.layers_per_token,
        "mean_depth": total.mean_depth,
        "flushes": total.flushes,
        "flush_rows": total.flush_rows / max(total.flushes, 1),
        "generation_tokens": total.decided,
        "exited_tokens": total.exited,
        "layer_executions": total.shallow_layer_tokens + total.deep_layer_tokens,
        "drafts_verified": total.verified,
        "drafts_accepted": total.accepted,
        "flops": total.flops,
        "probes": total.probes,
        "load_shifted_tokens": total.load_shifted,
    }
