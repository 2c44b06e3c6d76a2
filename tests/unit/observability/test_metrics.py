from __future__ import annotations

import pickle

from prometheus_client.parser import text_string_to_metric_families

from fathom.api.backend import ModelInfo, ReplicaReport
from fathom.observability.metrics import RequestTimer, ServerMetrics
from fathom.types import FinishReason

INFO = ModelInfo(num_layers=4, exit_layer=2, vocab_size=10, max_model_len=8)


def samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return found


def test_a_request_is_timed_and_counted() -> None:
    metrics = ServerMetrics("m")
    timer = RequestTimer(metrics, prompt_tokens=5)
    timer.begin([0, 1])
    timer.tokens(0, 1)
    timer.tokens(0, 3)
    timer.tokens(1, 2)
    timer.tokens(1, 0)
    timer.finish(0, "stop")
    assert (
        samples(metrics.render([]))[
            "fathom_e2e_request_latency_seconds_count", (("model_name", "m"),)
        ]
        == 0
    )
    timer.abandon("cancelled")
    found = samples(metrics.render([]))
    model = (("model_name", "m"),)
    assert found["fathom_time_to_first_token_seconds_count", model] == 1
    assert found["fathom_inter_token_latency_seconds_count", model] == 3
    assert found["fathom_e2e_request_latency_seconds_count", model] == 1
    assert found["fathom_prompt_tokens_total", model] == 5
    assert found["fathom_generation_tokens_total", model] == 6
    # All reasons are there from the start: a rate misses the first of a series that was not.
    for reason in FinishReason:
        labels = (("finished_reason", reason.value), ("model_name", "m"))
        assert found["fathom_request_success_total", labels] == (reason in ("stop", "cancelled"))
    assert found["fathom_replicas", model] == 0


def test_every_replica_has_its_own_series() -> None:
    metrics = ServerMetrics("m")
    reports = [
        ReplicaReport(
            replica=name,
            info=INFO,
            stats={
                "num_requests_running": running,
                "prefix_cache_hits": 8,
                "exit_rate": 0.5,
                "generation_tokens": 3,
            },
        )
        for name, running in (("a", 1), ("b", 2))
    ]
    text = metrics.render(reports)
    found = samples(text)
    for name, running in (("a", 1), ("b", 2)):
        labels = (("model_name", "m"), ("replica", name))
        assert found["fathom_num_requests_running", labels] == running
        assert found["fathom_prefix_cache_hits_total", labels] == 8
        assert found["fathom_exit_rate", labels] == 0.5
        assert found["fathom_replica_generation_tokens_total", labels] == 3
    assert found["fathom_replicas", (("model_name", "m"),)] == 2
    names = [line.split()[2] for line in text.decode().splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))


def test_figures_of_several_ingresses_stand_side_by_side() -> None:
    """Each is a series of its own, so that one that goes away is no counter that goes back."""
    both = {"a": ServerMetrics("m"), "b": ServerMetrics("m")}
    for tokens, metrics in zip((5, 7), both.values(), strict=True):
        timer = RequestTimer(metrics, prompt_tokens=tokens)
        timer.begin([0])
        timer.tokens(0, 1)
        timer.finish(0, "stop")
    collected = {name: metrics.collect() for name, metrics in both.items()}
    found = samples(both["a"].render([], pickle.loads(pickle.dumps(collected))))
    for ingress, tokens in (("a", 5), ("b", 7)):
        labels = (("ingress", ingress), ("model_name", "m"))
        assert found["fathom_prompt_tokens_total", labels] == tokens
        assert found["fathom_time_to_first_token_seconds_count", labels] == 1
    alone = samples(both["a"].render([]))
    assert alone["fathom_prompt_tokens_total", (("model_name", "m"),)] == 5


def test_a_figure_can_have_labels_of_its_own() -> None:
    stats = {
        "exit_threshold{policy=adaptive,confidence=softmax_gap}": 0.5,
        "exit_threshold{policy=budget,confidence=max_prob@1.5}": 0.25,
        "policy_samples{confidence=softmax_gap,verdict=agrees}": 7,
    }
    found = samples(ServerMetrics("m").render([ReplicaReport(replica="a", info=INFO, stats=stats)]))
    own = (("model_name", "m"), ("policy", "budget"), ("replica", "a"))
    assert found["fathom_exit_threshold", (("confidence", "max_prob@1.5"), *own)] == 0.25
    samples_of = (("confidence", "softmax_gap"), ("model_name", "m"), ("replica", "a"))
    assert found["fathom_policy_samples_total", (*samples_of, ("verdict", "agrees"))] == 7
