"""From answers to figures, under the names of vLLM's ``bench serve``."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fathom.bench.load_client import Answer
from fathom.bench.load_run import Load
from fathom.bench.measure import percentile

METRICS = ("ttft", "tpot", "itl", "e2el")
PERCENTILES = (50.0, 90.0, 95.0, 99.0)


def load_row(
    load: Load, *, slo_ms: Mapping[str, float], percentiles: Sequence[float] = PERCENTILES
) -> dict[str, Any]:
    """One row of the report.

    Throughputs count what was completed, over the whole time; errors are counted by their kind
    and belong to ``failed``. Percentiles are over completed requests.

    Args:
        slo_ms: see ``goodput_share``; empty for none.
    """
    good = [answer for answer in load.answers if not answer.error]
    kinds = Counter(answer.error for answer in load.answers if answer.error)
    tokens_in = sum(answer.prompt_tokens or 0 for answer in good)
    tokens_out = sum(answer.tokens for answer in good)
    counted = all(answer.output_tokens is not None for answer in good)
    within = sum(meets(answer, slo_ms) for answer in good)
    row: dict[str, Any] = {
        "duration": load.seconds,
        "num_prompts": len(load.answers),
        "completed": len(good),
        "failed": sum(kinds.values()),
        "errors": dict(kinds),
        "error_samples": _samples(load.answers),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "tokens_counted_by": "server" if counted else "chunks",
        "request_throughput": len(good) / load.seconds,
        "request_goodput": within / load.seconds if slo_ms else None,
        "goodput_share": within / len(load.answers) if slo_ms and load.answers else None,
        "output_throughput": tokens_out / load.seconds,
        "total_token_throughput": (tokens_in + tokens_out) / load.seconds,
        "max_concurrent_requests": load.most_at_once,
    }  # fmt: skip
    for metric, seconds in _values(good).items():
        row |= _summary(metric, seconds, percentiles)
    row["client"] = _client(load)
    row["compute"] = _compute(good)
    return row


def meets(answer: Answer, slo_ms: Mapping[str, float]) -> bool:
    """Whether an answer kept every limit.

    Args:
        slo_ms: of ``ttft``, ``tpot`` and ``e2el``, in ms. An answer of one token keeps any TPOT.
    """
    if answer.error or answer.ttft is None:
        return False
    found = {"ttft": answer.ttft, "tpot": answer.tpot or 0.0, "e2el": answer.latency}
    return all(found[name] * 1e3 <= limit for name, limit in slo_ms.items())


def _values(answers: Sequence[Answer]) -> dict[str, list[float]]:
    """Seconds, by metric."""
    return {
        "ttft": [answer.ttft for answer in answers if answer.ttft is not None],
        "tpot": [tpot for answer in answers if (tpot := answer.tpot) is not None],
        "itl": [seconds for answer in answers for seconds in answer.itl],
        "e2el": [answer.latency for answer in answers],
    }


def _summary(metric: str, seconds: list[float], percentiles: Sequence[float]) -> dict[str, Any]:
    ms = [1e3 * each for each in seconds]
    found: dict[str, Any] = {
        f"mean_{metric}_ms": statistics.fmean(ms) if ms else None,
        f"median_{metric}_ms": statistics.median(ms) if ms else None,
        f"std_{metric}_ms": statistics.pstdev(ms) if ms else None,
    }
    for percent in percentiles:
        found[f"p{percent:g}_{metric}_ms"] = percentile(ms, percent)
    return found


def _client(load: Load) -> dict[str, Any]:
    """What the load generator itself may have added: its lateness (ms), its share of a core."""
    return {
        "send_lag_ms_p50": _ms(load.send_lag_s, 50),
        "send_lag_ms_p99": _ms(load.send_lag_s, 99),
        "send_lag_ms_max": _ms(load.send_lag_s, 100),
        "loop_lag_ms_p50": _ms(load.loop_lag_s, 50),
        "loop_lag_ms_p99": _ms(load.loop_lag_s, 99),
        "cpu_share": load.cpu_s / load.seconds,
    }


def _ms(seconds: Sequence[float], percent: float) -> float | None:
    value = percentile(seconds, percent)
    return None if value is None else value * 1e3


def _compute(answers: Sequence[Answer]) -> dict[str, float | None] | None:
    """Means of Fathom's ledger, weighted by the requests' tokens; None where there is none."""
    told = [(a.compute, a.tokens) for a in answers if a.compute is not None]
    if not told:
        return None
    found: dict[str, float | None] = {}
    for name in ("layers_per_token", "exit_rate", "acceptance_rate", "mean_depth"):
        known = [(page[name], n) for page, n in told if page.get(name) is not None and n]
        total = sum(n for _, n in known)
        found[name] = sum(value * n for value, n in known) / total if total else None
    return found


def _samples(answers: Sequence[Answer]) -> dict[str, str]:
    """One message of each kind of error."""
    found: dict[str, str] = {}
    for answer in answers:
        if answer.error:
            found.setdefault(answer.error, answer.words)
    return found
