"""Prometheus metrics of the shadow: what it sees of each operating point, and whether it drifted.

They are of the whole server, unlike those of replicas; a scrape asks the shadow's one actor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_LABELS = ("model_name", "operating_point")

_GAUGES = {
    "alert": ("drift_alert", "1 where traffic is not what an operating point was measured on."),
    "agreement": (
        "shadow_agreement",
        "Share of output tokens that are the full model's, of the latest completions in the "
        "shadow, from 0 to 1.",
    ),
    "exit_rate": (
        "shadow_exit_rate",
        "Share of output tokens decided at the exit layer, of the latest completions in the "
        "shadow, from 0 to 1.",
    ),
    "layers_per_token": (
        "shadow_layers_per_token",
        "Layer executions an output token, of the latest completions in the shadow.",
    ),
    "psi": (
        "shadow_psi",
        "Population stability index of confidences against those measured; above 0.1 they have "
        "changed.",
    ),
}
_COUNTERS = {
    "alarms": ("drift_alarms", "Times that an operating point's drift alarm was raised."),
    "completions": ("shadow_completions", "Completions in the shadow."),
    "asked": ("shadow_rows", "Rows of the exit head in the shadow."),
    "decided": ("shadow_tokens", "Output tokens in the shadow."),
    "wrong": ("shadow_wrong_tokens", "Output tokens in the shadow that are not the full model's."),
    "exited": ("shadow_exited_tokens", "Output tokens in the shadow decided at the exit layer."),
    "layer_tokens": ("shadow_layer_tokens", "Layer executions for output tokens in the shadow."),
    "check_layer_tokens": (
        "shadow_check_layer_tokens",
        "Layer executions only to check completions of mode copy in the shadow.",
    ),
}


class ShadowMetrics(Collector):
    """Families of one state of the shadow.

    Args:
        state: see ``Service.shadow``.
    """

    def __init__(self, model_name: str, state: Mapping[str, Any]) -> None:
        self._model_name = model_name
        self._points: Mapping[str, Mapping[str, Any]] = state["points"]

    def collect(self) -> Iterable[Metric]:
        """One family a figure; a point of which it is not known has no sample in it."""
        for kind, table in (
            (GaugeMetricFamily, _GAUGES),
            (CounterMetricFamily, _COUNTERS),
        ):
            for key, (name, text) in table.items():
                family = kind(f"fathom_{name}", text, labels=_LABELS)
                for point, figures in self._points.items():
                    if figures[key] is not None:
                        family.add_metric((self._model_name, point), float(figures[key]))
                yield family
        yield self._promised()
        yield self._evidence()

    def _promised(self) -> Metric:
        text = "Least share of tokens that are to be the full model's before the alarm is raised."
        family = GaugeMetricFamily("fathom_shadow_least_agreement", text, labels=_LABELS)
        for point, figures in self._points.items():
            least = figures["expected"]["least_agreement"]
            if least is not None:
                family.add_metric((self._model_name, point), least)
        return family

    def _evidence(self) -> Metric:
        text = "Evidence that an operating point has drifted, 1 where there is none, by test."
        family = GaugeMetricFamily("fathom_drift_evidence", text, labels=(*_LABELS, "test"))
        for point, figures in self._points.items():
            for test, evidence in figures["evidence"].items():
                family.add_metric((self._model_name, point, test), evidence)
        return family
