"""When each rule flushes, that none makes anybody starve, and that no rule shows in the tokens."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.engine.costs import CostCurve, StageCosts
from fathom.engine.engine import Engine
from fathom.engine.flush_rules import FlushRule, FlushWhen
from fathom.types import AcceptMode, ComputePolicy, PolicyName, Request
from tests.unit.engine.conftest import drain, request, run

SHALLOW = CostCurve(((1, 0.010), (8, 0.011), (32, 0.018)))
DEEP = CostCurve(((1, 0.020), (8, 0.022), (32, 0.036)))
RULES = list(FlushWhen)
FULL = ComputePolicy(mode=AcceptMode.FULL)


def rule(
    when: FlushWhen = FlushWhen.RATE, shallow: CostCurve = SHALLOW, deep: CostCurve = DEEP
) -> FlushRule:
    return FlushRule(StageCosts(shallow=shallow, shallow_full=shallow, deep=deep), when)


@pytest.mark.parametrize("when", RULES)
def test_nothing_waiting_is_never_flushed_and_nothing_drafting_always_is(when):
    fresh = rule(when)
    assert not fresh.flush_now(waiting=0, drafting=5)
    assert not fresh.flush_now(waiting=0, drafting=0)
    assert fresh.flush_now(waiting=3, drafting=0)


@given(st.integers(1, 64), st.integers(1, 64), st.lists(st.integers(1, 64), max_size=8))
def test_full_waits_for_all_who_draft_and_eager_for_nobody(waiting, drafting, steps):
    full, eager = rule(FlushWhen.FULL), rule(FlushWhen.EAGER)
    for rows in steps:
        full.drafted(rows)
        eager.drafted(rows)
    assert not full.flush_now(waiting, drafting)
    assert eager.flush_now(waiting, drafting)


def test_a_round_goes_on_while_many_draft_and_ends_when_few_do():
    crowd = rule()
    crowd.drafted(8)
    assert not crowd.flush_now(waiting=1, drafting=7)
    for rows in (7, 5, 3):
        crowd.drafted(rows)
    assert crowd.flush_now(waiting=7, drafting=1)


def test_cheap_flushes_are_made_at_once():
    cheap = rule(deep=CostCurve(((1, 0.0001), (8, 0.0008))))
    cheap.drafted(8)
    assert cheap.flush_now(waiting=4, drafting=4)


@given(
    when=st.sampled_from(RULES),
    places=st.integers(1, 6),
    cap=st.integers(1, 9),
    seed=st.integers(0, 2**32),
)
def test_nobody_starves_while_others_come_and_draft(when, places, cap, seed):
    """Each waits at most until all places have stacks that are full: ``places * cap`` steps."""
    chance = random.Random(seed)
    own = rule(when)
    drafts: list[int] = []  # of each sequence under way
    waits: list[int] = []  # steps that it has waited for; 0: it drafts
    for _ in range(300):
        if len(drafts) < places and chance.random() < 0.3:
            drafts.append(0)
            waits.append(0)
        drafting = [i for i, steps in enumerate(waits) if not steps]
        own.drafted(len(drafting))
        for i in drafting:
            drafts[i] += 1
            waits[i] = int(drafts[i] == cap or chance.random() < 0.2)
        waiting = len(waits) - waits.count(0)
        if own.flush_now(waiting, waits.count(0)):
            own.flushed()
            kept = [i for i, s in enumerate(waits) if not s or chance.random() < 0.7]
            drafts = [0 if waits[i] else drafts[i] for i in kept]
            waits = [0] * len(kept)
        waits = [steps + (steps > 0) for steps in waits]
        assert max(waits, default=0) <= places * cap + 1


@pytest.fixture(scope="module")
def engines(make_engine) -> dict[FlushWhen, Engine]:
    return {
        when: make_engine(flush_rule=when, max_num_seqs=4, prefix_caching=False) for when in RULES
    }


def some_requests(chance: random.Random, modes: list[AcceptMode]) -> list[Request]:
    return [
        request(
            f"r{number}",
            chance.choices(range(3, 40), k=chance.randint(1, 30)),
            ComputePolicy(
                mode=chance.choice(modes),
                policy=PolicyName.FORCED,
                forced_exit_rate=chance.choice([0.2, 0.6, 0.95]),
                max_stack=chance.randint(1, 8),
            ),
            max_tokens=chance.randint(1, 20),
        )
        for number in range(chance.randint(1, 7))
    ]


@pytest.mark.parametrize("when", RULES)
@settings(max_examples=15)
@given(seed=st.integers(0, 2**32))
def test_exact_gives_the_tokens_of_full_under_every_rule(engines, when, seed):
    requests = some_requests(random.Random(seed), [AcceptMode.EXACT])
    found = run(engines[when], requests)
    full = run(
        engines[FlushWhen.RATE],
        [
            request(each.request_id, each.prompt_token_ids, FULL,
                    max_tokens=each.sampling.max_tokens)
            for each in requests
        ],
    )  # fmt: skip
    assert {name: done.ids for name, done in found.items()} == {
        name: done.ids for name, done in full.items()
    }


@pytest.mark.parametrize("when", RULES)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32))
def test_in_an_engine_every_sequence_gets_its_flush(engines, when, seed):
    """In all modes at once, and with requests that come while others wait."""
    engine, chance = engines[when], random.Random(seed)
    coming = some_requests(chance, list(AcceptMode))
    scheduler = engine._scheduler
    waited: dict[int, int] = {}
    while coming or engine.has_work():
        if coming and chance.random() < 0.4:
            engine.add_request(coming.pop())
        engine.step()
        left = [seq.seq_id for seq in scheduler.running if seq.is_flushable]
        waited = {seq_id: waited.get(seq_id, 0) + 1 for seq_id in left}
        assert when is not FlushWhen.EAGER or not left  # all fit into a pass
        assert max(waited.values(), default=0) <= 4 * 8
    assert not drain(engine)


def test_eager_makes_more_passes_than_full(make_engine):
    flushes = {}
    for when in (FlushWhen.EAGER, FlushWhen.FULL):
        engine = make_engine(flush_rule=when, max_num_seqs=8)
        # Eight at once, on prompts that all differ: they do not stop at the same steps.
        compute = ComputePolicy(policy=PolicyName.FORCED, forced_exit_rate=0.7)
        prompts = [[3 + i, 9, 5, 3 + 2 * i] for i in range(8)]
        done = run(engine, [request(str(i), p, compute) for i, p in enumerate(prompts)])
        assert sum(len(each.ids) for each in done.values()) == 8 * 24
        flushes[when] = engine.stats()["flushes"]
    assert flushes[FlushWhen.FULL] < flushes[FlushWhen.EAGER]
