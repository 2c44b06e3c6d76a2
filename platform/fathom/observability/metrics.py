"""Prometheus metrics of a server. Names mirror vLLM's with the prefix ``fathom_``.

Latencies and token counts are measured where requests enter; everything about an engine comes
from its replica's report at the time of the scrape, labelled with the replica. Where several
ingresses take requests, a scrape reaches one of them, which then asks the others: what each has
measured is labelled with the ingress, and a sum over that label is the server's.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fathom.api.backend import ReplicaReport
from fathom.observability.classifier_metrics import ClassifierMetrics
from fathom.observability.shadow import ShadowMetrics
from fathom.types import FinishReason

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (
    0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
    320, 640,
)  # fmt: skip
_STEP_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5,
)  # fmt: skip

# Figures that only grow; whatever else an engine reports is a gauge.
_COUNTERS = frozenset(
    {
        "drafts_accepted",
        "drafts_verified",
        "exited_tokens",
        "flops",
        "flushes",
        "generation_tokens",
        "layer_executions",
        "num_preemptions",
        "prefix_cache_hits",
        "prefix_cache_queries",
        "kv_store_hits",
        "deep_reopens",
        "load_shifted_tokens",
        "policy_samples",
        "probes",
    }
)
# The server counts these itself, under the plain name.
_RENAMED = {"generation_tokens": "replica_generation_tokens"}
_HELP = {
    "num_requests_running": "Requests that the engine runs now.",
    "num_requests_waiting": "Requests that wait for the engine to admit them.",
    "kv_cache_usage_perc": "Share of KV blocks in use, from 0 to 1.",
    "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache.",
    "kv_store_hits": "Prompt tokens found in the shared KV store.",
    "flushes_away": "Flushes that are under way to the deep replica.",
    "deep_reopens": "Deep replicas that were lost and replaced by another.",
    "flops": "Multiply-adds x 2 of everything run.",
    "flushes": "Deep passes.",
    "generation_tokens": "Tokens that this replica has generated.",
    "exited_tokens": "Output tokens decided at the exit layer.",
    "layer_executions": "Layer executions of output tokens, rejected drafts included.",
    "drafts_verified": "Drafts that the deep stage has spoken on.",
    "drafts_accepted": "Drafts that the deep stage agreed with.",
    "num_preemptions": "Requests recomputed because KV blocks ran out.",
    "exit_rate": "Share of output tokens decided at the exit layer, from 0 to 1.",
    "acceptance_rate": "Share of verified drafts that the deep stage agreed with, from 0 to 1.",
    "layers_per_token": "Layer executions an output token, rejected drafts included.",
    "flush_rows": "Mean rows of a deep pass.",
    "drafting_paused": "1 while a mode drafts nothing, since it would cost time, else 0.",
    "cost_drift": "What passes take over what they took when the replica started.",
    "flush_seconds": "Seconds from a flush to its answer, mean of the latest.",
    "flush_queue_seconds": "Seconds that a flush waits for its deep pass, mean of the latest.",
    "deep_pass_seconds": "Seconds of a deep pass, mean of the latest.",
    "exit_threshold": "Confidence above which a token exits, by policy and measure.",
    "policy_samples": "Drafts that exit policies have seen, by what the deep stage said of them.",
    "mixture_alpha": "Parameter alpha of a component of the confidences' beta mixture.",
    "mixture_beta": "Parameter beta of a component of the confidences' beta mixture.",
    "mixture_weight": "Share of drafts in a component of the confidences' beta mixture.",
    "probes": "Exits that went to the deep stage all the same, for policies to learn from.",
    "risk_alert": "1 where drafts disagree more than policy risk has promised, else 0.",
    "risk_evidence": "Evidence against a promise of policy risk; 20 and more raise the alert.",
    "risk_observed": "Share of tokens that differ from the full model's, of the latest requests.",
    "load_level": "How many times cheaper than asked for requests may be decided, by load.",
    "load_shifted_tokens": "Output tokens decided at a cheaper setting than asked for.",
}


class ServerMetrics:
    """The metrics of one server. Not thread-safe beyond what prometheus_client gives."""

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._model_name = model_name
        labels = ["model_name"]

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            metric = Histogram(name, text, labels, buckets=buckets, registry=self._registry)
            return metric.labels(model_name)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, labels, registry=self._registry).labels(model_name)

        self.ttft = histogram(
            "fathom_time_to_first_token_seconds",
            "Seconds from a request's arrival to its first token.",
            _SECONDS,
        )
        self.inter_token = histogram(
            "fathom_inter_token_latency_seconds",
            "Seconds a token after the first, over the tokens that arrive together.",
            _STEP_SECONDS,
        )
        self.e2e = histogram(
            "fathom_e2e_request_latency_seconds",
            "Seconds from a request's arrival to its end.",
            _SECONDS,
        )
        self.prompt_tokens = counter("fathom_prompt_tokens", "Prompt tokens of all requests.")
        self.generation_tokens = counter("fathom_generation_tokens", "Tokens generated.")
        self.streams_resumed = counter(
            "fathom_streams_resumed", "Streams whose clients came back for the rest."
        )
        self.journal_losses = counter(
            "fathom_journal_losses",
            "Times that the journal stopped answering, so that streams went on without it.",
        )
        self.resumptions = counter(
            "fathom_request_resumptions",
            "Times that a request went on at another replica because its own was lost.",
        )
        self._finished = Counter(
            "fathom_request_success",
            "Completions by the way they ended.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        for reason in FinishReason:  # a rate misses the first of a series that was not there
            self._finished.labels(model_name, reason.value)

    def count_finished(self, reason: str) -> None:
        """Count the end of one completion."""
        self._finished.labels(self._model_name, reason).inc()

    def of_classifier(self) -> ClassifierMetrics:
        """Metrics of the classifier that is served beside the model; to be asked for once."""
        return ClassifierMetrics(self._registry)

    def collect(self) -> list[Metric]:
        """What was measured here, for another ingress to show."""
        return list(self._registry.collect())

    def render(
        self,
        reports: Iterable[ReplicaReport],
        ingresses: Mapping[str, Sequence[Metric]] | None = None,
        shadow: Mapping[str, Any] | None = None,
    ) -> bytes:
        """The text exposition of this server's metrics and its replicas' figures.

        Args:
            ingresses: what each ingress has measured, this one included, by their names; None
                where this is the only one.
            shadow: what the shadow has found, if there is one; see ``Service.shadow``.
        """
        replicas = CollectorRegistry(auto_describe=False)
        replicas.register(_Replicas(self._model_name, list(reports)))
        if shadow is not None:
            replicas.register(ShadowMetrics(self._model_name, shadow))
        requests = self._registry
        if ingresses:
            requests = CollectorRegistry(auto_describe=False)
            requests.register(_Ingresses(ingresses))
        return generate_latest(requests) + generate_latest(replicas)


class RequestTimer:
    """Takes the times of one request, from its creation on."""

    def __init__(self, metrics: ServerMetrics, prompt_tokens: int) -> None:
        self._metrics = metrics
        self._start = time.perf_counter()
        self._last: dict[int, float] = {}  # completion -> time of its latest tokens
        self._open: set[int] = set()
        metrics.prompt_tokens.inc(prompt_tokens)

    def begin(self, indices: Iterable[int]) -> None:
        """Name the completions that are to come."""
        self._open.update(indices)

    def tokens(self, index: int, count: int) -> None:
        """Note ``count`` new tokens of a completion."""
        if not count:
            return
        now = time.perf_counter()
        if not self._last:
            self._metrics.ttft.observe(now - self._start)
        if index in self._last:
            step = (now - self._last[index]) / count
            for _ in range(count):
                self._metrics.inter_token.observe(step)
        self._last[index] = now
        self._metrics.generation_tokens.inc(count)

    def finish(self, index: int, reason: str) -> None:
        """Note the end of a completion; the last one ends the request."""
        self._open.discard(index)
        self._metrics.count_finished(reason)
        if not self._open:
            self._metrics.e2e.observe(time.perf_counter() - self._start)

    def abandon(self, reason: str) -> None:
        """Note that whatever has not finished never will."""
        for index in list(self._open):
            self.finish(index, reason)


class _Ingresses(Collector):
    """The same families from several ingresses, each sample labelled with its ingress."""

    def __init__(self, ingresses: Mapping[str, Sequence[Metric]]) -> None:
        self._ingresses = ingresses

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for ingress, found in sorted(self._ingresses.items()):
            for each in found:
                family = families.setdefault(
                    each.name, Metric(each.name, each.documentation, each.type, each.unit)
                )
                family.samples += [
                    sample._replace(labels={**sample.labels, "ingress": ingress})
                    for sample in each.samples
                ]
        return families.values()


class _Replicas(Collector):
    def __init__(self, model_name: str, reports: list[ReplicaReport]) -> None:
        self._model_name = model_name
        self._reports = reports

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("fathom_replicas", "Replicas that answer.", labels=["model_name"])
        up.add_metric([self._model_name], len(self._reports))
        yield up
        samples: dict[str, list[tuple[dict[str, str], float]]] = defaultdict(list)
        for report in self._reports:
            for key, value in report.stats.items():
                name, own = _labels_of(key)
                labels = {"model_name": self._model_name, "replica": report.replica, **own}
                samples[name].append((labels, value))
        for name, found in sorted(samples.items()):
            kind = CounterMetricFamily if name in _COUNTERS else GaugeMetricFamily
            text = _HELP.get(name, name.replace("_", " ").capitalize() + ".")
            full_name = f"fathom_{_RENAMED.get(name, name)}"
            family = kind(full_name, text, labels=list(found[0][0]))
            for labels, value in found:
                family.add_metric(list(labels.values()), value)
            yield family


def _labels_of(key: str) -> tuple[str, dict[str, str]]:
    """Name and labels of a figure: ``name`` or ``name{label=value,...}``."""
    name, _, rest = key.partition("{")
    pairs = rest.rstrip("}").split(",") if rest else []
    return name, dict(pair.split("=", 1) for pair in pairs)
