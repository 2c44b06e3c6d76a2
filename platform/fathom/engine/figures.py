"""What an engine tells of itself: figures under the names of the metrics."""

from __future__ import annotations

from fathom.engine.deep import DeepStage
from fathom.engine.scheduler import Scheduler
from fathom.ledger import Ledger


def figures(scheduler: Scheduler, deep: DeepStage, ledger: Ledger) -> dict[str, float]:
    """Figures of this moment, and totals since the engine's start."""
    total, shared = ledger.total, scheduler.shared
    caches = (scheduler.shallow_cache, deep.cache)
    usage = max(1 - c.num_available_blocks / c.num_usable_blocks for c in caches)
    live = (*scheduler.running, *scheduler.waiting)
    unforked = sum(len(seq.children) for seq in live)
    return {
        "num_requests_running": len(scheduler.running),
        "num_requests_waiting": len(scheduler.waiting) + unforked,
        "kv_cache_usage_perc": usage,
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
        "flops": total.flops,
        "probes": total.probes,
    }
