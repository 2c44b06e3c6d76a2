"""What a vLLM replica tells of itself: figures under the names of our metrics."""

from __future__ import annotations

from typing import Any

from fathom.ledger import Ledger


class Figures:
    """Listens to vLLM's statistics, as one of its ``StatLoggerBase``.

    Not a subclass, so that it needs no vLLM; vLLM calls the methods below.
    """

    def __init__(self) -> None:
        self._waiting = 0
        self._kv_usage = 0.0
        self._queries = 0
        self._hits = 0
        self._preemptions = 0

    def record(
        self,
        scheduler_stats: Any = None,
        iteration_stats: Any = None,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Called by vLLM after each step of its engine."""
        if scheduler_stats is not None:
            self._waiting = (
                scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            )
            self._kv_usage = scheduler_stats.kv_cache_usage
            self._queries += scheduler_stats.prefix_cache_stats.queries
            self._hits += scheduler_stats.prefix_cache_stats.hits
        if iteration_stats is not None:
            self._preemptions += iteration_stats.num_preempted_reqs

    def log_engine_initialized(self) -> None:
        """Called by vLLM."""

    def log(self) -> None:
        """Called by vLLM."""

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        """Called by vLLM."""

    def stats(self, ledger: Ledger, live: int) -> dict[str, float]:
        """Figures of this moment, and totals since the start.

        What vLLM recomputes after a preemption is in no account.

        Args:
            live: completions that have not ended. vLLM falls silent after its last step, so its
                own count may be of requests that are gone.
        """
        total = ledger.total
        waiting = min(self._waiting, live)
        return {
            "num_requests_running": live - waiting,
            "num_requests_waiting": waiting,
            "kv_cache_usage_perc": self._kv_usage if live else 0.0,
            "prefix_cache_queries": self._queries,
            "prefix_cache_hits": self._hits,
            "num_preemptions": self._preemptions,
            "exit_rate": 0.0,
            "layers_per_token": total.layers_per_token,
            "mean_depth": total.mean_depth,
            "generation_tokens": total.decided,
            "exited_tokens": 0,
            "layer_executions": total.shallow_layer_tokens + total.deep_layer_tokens,
            "flops": total.flops,
        }
