"""Prometheus metrics of a classifier, measured where requests enter."""

from __future__ import annotations

from collections import Counter as Count

from prometheus_client import CollectorRegistry, Counter, Histogram

from fathom.classification import ClassifyResult

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)


class ClassifierMetrics:
    """What ``/v1/classify`` has answered.

    Args:
        registry: of the server's metrics.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "fathom_classify_request_seconds",
            "Seconds from a classification's arrival to its answer.",
            ["model_name"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._inputs = Counter(
            "fathom_classify_inputs",
            "Inputs classified, by the exit head that decided, from 1.",
            ["model_name", "head"],
            registry=registry,
        )
        self._flops = Counter(
            "fathom_classify_flops",
            "Multiply-adds x 2 of the inputs classified.",
            ["model_name"],
            registry=registry,
        )
        self._full_flops = Counter(
            "fathom_classify_full_flops",
            "What the same inputs would have taken through the whole model.",
            ["model_name"],
            registry=registry,
        )

    def answered(self, model_name: str, result: ClassifyResult, seconds: float) -> None:
        """Count a request that was answered."""
        self._seconds.labels(model_name).observe(seconds)
        for head, inputs in Count(row.head for row in result.rows).items():
            self._inputs.labels(model_name, str(head)).inc(inputs)
        self._flops.labels(model_name).inc(result.flops)
        self._full_flops.labels(model_name).inc(result.full_flops)
