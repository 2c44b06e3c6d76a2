"""Exit policies in the engine: what decides an exit, what is probed, and what is told of it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.api.usage import add_compute, compute_body
from fathom.engine.engine import Engine
from fathom.engine.trace import TEMPERATURES, DraftRecord
from fathom.exits.meta import MetaClassifier
from fathom.models.adapters import Adapter
from fathom.models.decoder import Decoder
from fathom.models.errors import ModelError
from fathom.models.load import load_exit_layers
from fathom.types import (
    AcceptMode,
    ComputePolicy,
    ComputeUsage,
    Confidence,
    InvalidRequest,
    PolicyName,
)
from tests.unit.engine.conftest import EXIT_LAYER, MakeEngine, request, run, run_one
from tests.unit.reference_attention import ContiguousAttention

PROMPT = [5, 6, 7, 8, 9]
FREE = ComputePolicy(mode=AcceptMode.FREE, exit_threshold=0.05)
MEASURES = [measure for measure in Confidence if measure is not Confidence.META]


@pytest.fixture(scope="module")
def engine(make_engine: MakeEngine) -> Engine:
    return make_engine()


def traced(engine: Engine, *requests, hidden: bool = False):
    """What the requests gave, and the records of their drafts."""
    records: list[DraftRecord] = []
    engine.trace(records.append, hidden=hidden)
    try:
        return run(engine, requests), records
    finally:
        engine.trace(None)


# Confidence


def score_of(record: DraftRecord, measure: Confidence, vocabulary: int) -> float:
    return {
        Confidence.SOFTMAX_GAP: record.confidence,
        Confidence.MAX_PROB: record.max_prob,
        Confidence.ENTROPY: 1 - record.entropy / math.log(vocabulary),
        Confidence.SATURATION: record.saturation,
    }[measure]


@pytest.mark.parametrize("with_exit_layers", [False, True])
@pytest.mark.parametrize("measure", MEASURES)
def test_each_measure_decides_by_its_own_score(
    make_engine: MakeEngine, exit_adapter: Adapter, measure: Confidence, with_exit_layers: bool
) -> None:
    engine = make_engine(trained=exit_adapter if with_exit_layers else None)
    vocabulary = engine.info.exit_vocab
    never = dataclasses.replace(FREE, confidence=measure, exit_threshold=1.0)
    _, records = traced(engine, request("a", PROMPT, never, max_tokens=40))
    scores = sorted(score_of(r, measure, vocabulary) for r in records)
    middle = (scores[19] + scores[20]) / 2
    compute = dataclasses.replace(never, exit_threshold=middle, max_stack=64)
    done, records = traced(engine, request("a", PROMPT, compute, max_tokens=40))
    exited = [r.exited for r in records]
    assert exited == [score_of(r, measure, vocabulary) > middle for r in records]
    assert {True, False} == set(exited)
    assert sum(exited) == done["a", 0].last.usage.compute.exited


@pytest.mark.parametrize("with_exit_layers", [False, True])
def test_saturation_compares_the_last_two_states_of_the_exit(
    make_engine: MakeEngine, decoder: Decoder, exit_adapter: Adapter, with_exit_layers: bool
) -> None:
    """Prefilled in pieces and beside another sequence, against contiguous attention."""
    trained = exit_adapter if with_exit_layers else None
    engine = make_engine(trained=trained, max_num_batched_tokens=16)
    never = dataclasses.replace(FREE, exit_threshold=1.0)
    long = [*range(3, 39)] * 2
    done, records = traced(
        engine,
        request("a", long, never, max_tokens=12),
        request("b", PROMPT, ComputePolicy(mode=AcceptMode.FULL), max_tokens=12),
        hidden=True,
    )
    tokens = long + done["a", 0].ids
    heads = decoder.config.num_heads, decoder.config.num_kv_heads
    attend, positions = ContiguousAttention(*heads), list(range(len(tokens)))
    attend.set_rows([0] * len(tokens), positions)
    at, states = torch.tensor(positions), decoder.embed(torch.tensor(tokens))
    for layer in range(EXIT_LAYER):
        earlier, states = states, decoder.run(states, at, layer, layer + 1, attend)
    if trained is not None:
        own = load_exit_layers(decoder, trained)
        assert own is not None
        earlier, states = states, own.run(states, at, EXIT_LAYER, EXIT_LAYER + 1, attend)
    cosine = torch.cosine_similarity(states, earlier, dim=1)
    assert [r.request_id for r in records] == ["a"] * 12
    for record in records:
        assert record.saturation == pytest.approx(float(1 + cosine[record.position]) / 2, abs=1e-5)
        kept = torch.frombuffer(bytearray(record.hidden or b""), dtype=torch.float16)
        torch.testing.assert_close(kept.float(), states[record.position], atol=0.01, rtol=0.01)


def test_a_temperature_moves_the_confidence_and_not_the_draft(engine: Engine) -> None:
    place = 12
    hot = dataclasses.replace(FREE, confidence=Confidence.MAX_PROB, exit_threshold=1.0)
    _, records = traced(engine, request("a", PROMPT, hot, max_tokens=40))
    temperature = TEMPERATURES[place]
    scaled = [math.exp(r.best_logit / temperature - r.lse[place]) for r in records]
    middle = sorted(scaled)[30]
    compute = dataclasses.replace(
        hot, exit_temperature=temperature, exit_threshold=middle * 1.0001, max_stack=64
    )
    _, after = traced(engine, request("a", PROMPT, compute, max_tokens=40))
    first = next(i for i, value in enumerate(scaled) if value > middle * 1.0001)
    assert [r.shallow_token for r in after[: first + 1]] == [
        r.shallow_token for r in records[: first + 1]
    ]
    assert [r.exited for r in after] == [
        math.exp(r.best_logit / temperature - r.lse[place]) > middle * 1.0001 for r in after
    ]


def test_a_trace_knows_the_exits_logit_of_the_deep_choice(engine: Engine) -> None:
    never = dataclasses.replace(FREE, exit_threshold=1.0)
    _, records = traced(engine, request("a", PROMPT, never, max_tokens=40))
    for record in records:
        assert record.second_logit <= record.best_logit
        assert record.deep_logit <= record.best_logit
        assert record.agrees == (record.deep_logit == record.best_logit)


def test_a_mixed_batch_is_the_sum_of_its_parts(engine: Engine) -> None:
    def mixed() -> list:
        thresholds = {Confidence.ENTROPY: 0.005, Confidence.SATURATION: 0.99}
        return [
            request(
                measure.value,
                [3 + place, 9, 4],
                dataclasses.replace(
                    FREE, confidence=measure, exit_threshold=thresholds.get(measure, 0.05)
                ),
                max_tokens=30,
            )
            for place, measure in enumerate(MEASURES)
        ]

    together = run(engine, mixed())
    for item in mixed():
        alone = run_one(engine, item)
        assert together[item.request_id, 0].ids == alone.ids
        assert together[item.request_id, 0].depths == alone.depths


# Probes


@pytest.mark.parametrize("mode", [AcceptMode.FREE, AcceptMode.ROLLBACK, AcceptMode.COPY])
def test_all_exits_can_be_probed(engine: Engine, mode: AcceptMode) -> None:
    compute = ComputePolicy(mode=mode, policy=PolicyName.ALWAYS, probe_rate=1.0)
    done, records = traced(engine, request("a", PROMPT, compute, max_tokens=20))
    full = run_one(engine, request("b", PROMPT, ComputePolicy(mode=AcceptMode.FULL), max_tokens=20))
    assert done["a", 0].ids == full.ids
    usage = done["a", 0].last.usage.compute
    assert usage.exited == usage.drafted == 0
    assert usage.probes == len(records) > 15
    assert all(record.probe and not record.exited for record in records)


def test_probes_are_a_share_of_exits_and_the_same_for_a_seed(engine: Engine) -> None:
    compute = ComputePolicy(
        mode=AcceptMode.FREE, policy=PolicyName.ALWAYS, probe_rate=0.3, max_stack=64
    )
    again = [
        run(
            engine,
            [request(str(i), [3 + i, 4], compute, max_tokens=60, seed=i) for i in range(count)],
        )
        for count in (8, 4)
    ]
    for i in range(4):
        assert again[0][str(i), 0].depths == again[1][str(i), 0].depths
    pages = [again[0][str(i), 0].last.usage.compute for i in range(8)]
    probes = sum(page.probes for page in pages)
    assert 0.22 < probes / (probes + sum(page.drafted for page in pages)) < 0.38


# Policies


live = st.builds(
    ComputePolicy,
    mode=st.just(AcceptMode.EXACT),
    policy=st.sampled_from([PolicyName.ADAPTIVE, PolicyName.BUDGET, PolicyName.RISK]),
    confidence=st.sampled_from(MEASURES),
    exit_temperature=st.sampled_from([1.0, 0.1, 3.0]),
    exit_threshold=st.floats(0, 1),
    budget=st.floats(0.8, 1),
    risk=st.just(0.1),
    probe_rate=st.sampled_from([None, 0.5]),
    max_stack=st.integers(1, 9),
)


@settings(max_examples=20, deadline=None)
@given(
    items=st.lists(
        st.tuples(st.lists(st.integers(3, 39), min_size=1, max_size=20), live),
        min_size=1,
        max_size=5,
    )
)
def test_exact_is_full_whatever_a_policy_has_seen(engine: Engine, items) -> None:
    """The engine's counts go on from example to example."""
    done = run(engine, [request(str(i), p, c, max_tokens=30) for i, (p, c) in enumerate(items)])
    for i, (prompt, _) in enumerate(items):
        full = ComputePolicy(mode=AcceptMode.FULL)
        assert done[str(i), 0].ids == run_one(engine, request("f", prompt, full, max_tokens=30)).ids


@pytest.mark.parametrize("mode", [AcceptMode.FREE, AcceptMode.COPY, AcceptMode.ROLLBACK])
def test_a_budget_is_spent_as_asked_for(make_engine: MakeEngine, mode: AcceptMode) -> None:
    engine = make_engine()
    cost = engine.ledger.costs.exit_cost
    wanted = 1 - 0.4 * (1 - cost)
    compute = ComputePolicy(mode=mode, policy=PolicyName.BUDGET, budget=wanted, rollback_nats=1000)
    for name in ("first", "second"):
        usage = run_one(engine, request(name, PROMPT, compute, max_tokens=200)).last.usage.compute
        assert usage.requested_budget == wanted
        assert usage.realised_budget == pytest.approx(wanted, abs=0.02)
        assert usage.realised_budget == pytest.approx(1 - usage.exit_rate * (1 - cost))


def test_a_budget_out_of_reach_is_refused_at_the_door(engine: Engine) -> None:
    compute = ComputePolicy(policy=PolicyName.BUDGET, budget=0.05)
    with pytest.raises(InvalidRequest, match="budget must be at least") as error:
        engine.add_request(request("a", PROMPT, compute))
    assert error.value.param == "budget"
    assert not engine.has_work()


def test_flushes_label_every_row_that_stands_and_in_copy_probes_alone_tell_of_exits(
    make_engine: MakeEngine,
) -> None:
    engine = make_engine()
    adaptive = ComputePolicy(
        mode=AcceptMode.FREE, policy=PolicyName.ADAPTIVE, exit_threshold=0.05, probe_rate=0.2
    )
    copying = dataclasses.replace(adaptive, mode=AcceptMode.COPY, policy=PolicyName.THRESHOLD)
    usage = {
        mode: run_one(engine, request(mode, PROMPT, compute, max_tokens=48)).last.usage.compute
        for mode, compute in (("free", adaptive), ("copy", copying))
    }
    measures = engine.policies.snapshot()["measures"]
    free, copy = measures["softmax_gap"]["rows"], measures["softmax_gap+copy"]["rows"]
    assert free["unlabelled"] == 0
    assert free["agrees"] + free["disagrees"] == usage["free"].exit_head_rows
    assert copy["unlabelled"] == usage["copy"].exited > 0
    labelled = copy["agrees"] + copy["disagrees"]
    assert labelled == usage["copy"].exit_head_rows - usage["copy"].exited
    assert usage["copy"].probes > 0


def test_a_promise_that_is_broken_raises_an_alert(make_engine: MakeEngine) -> None:
    """A random model's exit is hardly ever right, so any exit at all breaks it."""
    engine = make_engine()
    for mode, rate in ((AcceptMode.FREE, None), (AcceptMode.COPY, 0.3)):
        compute = ComputePolicy(
            mode=mode,
            policy=PolicyName.RISK,
            risk=0.02,
            exit_threshold=0.02 if mode is AcceptMode.FREE else 0.021,
            probe_rate=rate,
        )
        run(engine, [request(str(i), [3 + i, 5], compute, max_tokens=40) for i in range(24)])
    told = {n: v for n, v in engine.stats().items() if n.startswith("risk_alert")}
    assert list(told.values()) == [1.0, 1.0]


def test_what_a_request_asked_for_is_in_its_usage(engine: Engine) -> None:
    compute = dataclasses.replace(FREE, operating_point="fast")
    usage = run_one(engine, request("a", PROMPT, compute)).last.usage.compute
    assert usage.operating_point == "fast"
    assert usage.requested_budget is None
    assert usage.realised_budget == pytest.approx(
        1 - usage.exit_rate * (1 - engine.ledger.costs.exit_cost)
    )


def test_pages_add_up() -> None:
    pages = [
        ComputeUsage(mode="free", decided=30, probes=1, requested_budget=0.5, realised_budget=0.4),
        ComputeUsage(mode="free", decided=10, probes=2, requested_budget=0.5, realised_budget=0.8),
        ComputeUsage(mode="free", requested_budget=0.5),
    ]
    body = compute_body(add_compute(pages))
    assert (body["probes"], body["requested_budget"]) == (3, 0.5)
    assert body["realised_budget"] == pytest.approx(0.5)
    assert compute_body(add_compute([]))["realised_budget"] is None


# The meta classifier


def test_a_trained_classifier_is_a_confidence(make_engine: MakeEngine, tmp_path: Path) -> None:
    base = make_engine()
    compute = dataclasses.replace(FREE, confidence=Confidence.META, exit_threshold=0.5)
    with pytest.raises(InvalidRequest, match="trained classifier"):
        base.add_request(request("a", PROMPT, compute))
    torch.manual_seed(0)
    model = MetaClassifier(32)
    torch.nn.init.normal_(model.outer.weight, std=2.0)
    path = tmp_path / "meta.safetensors"
    model.save(path, base.info.weights_digest)
    engine = make_engine(meta=str(path))
    done, records = traced(engine, request("a", PROMPT, compute, max_tokens=40), hidden=True)
    states = torch.stack(
        [torch.frombuffer(bytearray(r.hidden or b""), dtype=torch.float16) for r in records]
    )
    scores = model.confidence(states.float()).tolist()
    clear = [
        (s > 0.5, r.exited) for s, r in zip(scores, records, strict=True) if abs(s - 0.5) > 0.02
    ]
    assert all(sure == exited for sure, exited in clear)
    assert {True, False} == {exited for _, exited in clear}
    plain = run_one(
        base, request("b", PROMPT, dataclasses.replace(FREE, exit_threshold=1.0), max_tokens=1)
    )
    own = run_one(
        engine, request("b", PROMPT, dataclasses.replace(compute, exit_threshold=1.0), max_tokens=1)
    )
    params = sum(p.numel() for p in model.parameters())
    assert own.last.usage.compute.flops - plain.last.usage.compute.flops == 2 * params
    assert done["a", 0].last.usage.compute.exited > 0


def test_a_classifier_of_another_adapter_or_width_is_refused(
    make_engine: MakeEngine, tmp_path: Path
) -> None:
    path = tmp_path / "meta.safetensors"
    digest = make_engine().info.weights_digest
    MetaClassifier(32).save(path, digest, {"adapter_digest": "another"})
    with pytest.raises(ModelError, match="adapter another"):
        make_engine(meta=str(path))
    MetaClassifier(48).save(path, digest)
    with pytest.raises(ModelError, match="width 48, this model's have 32"):
        make_engine(meta=str(path))
