"""Drafting that pauses: nobody sees it in the tokens, and it pays."""

from __future__ import annotations

import random

import pytest

from fathom.engine import drafting
from fathom.engine.costs import CostCurve, StageCosts
from fathom.engine.drafting import DraftRule
from fathom.engine.engine import Engine
from fathom.models.adapters import Adapter
from fathom.types import AcceptMode, ComputePolicy
from tests.unit.engine.conftest import drain, request, run

FLAT = CostCurve(((1, 1.0), (64, 1.5)))
STEEP = CostCurve(((1, 10.0), (64, 640.0)))
CHEAP = CostCurve(((1, 0.5), (64, 0.6)))
DEEP = CostCurve(((1, 10.0), (64, 14.0)))


def told(costs: StageCosts, exit_share: float, agreed: float, rows: int = 400) -> DraftRule:
    rule = DraftRule(costs)
    for i in range(rows):
        rule.decided(exited=i < exit_share * rows)
    for i in range(int(exit_share * rows)):
        rule.judged(agreed=i < agreed * exit_share * rows)
    return rule


def test_one_sequence_gains_what_the_formula_of_free_md_says() -> None:
    """Every draft right, e exits a row: 1 / (1 - e) tokens in 1 / (1 - e) shallow steps and a
    deep pass, up to the longest round."""
    rule = told(StageCosts(shallow=FLAT, shallow_full=FLAT, deep=DEEP), 0.5, 1.0)
    tokens = sum(0.5**j for j in range(9))
    # right = (e a)^j with a = (agreed + 1) / (judged + 1) = 1
    expected = tokens / (tokens + DEEP(tokens)) / (1 / (1 + DEEP(1)))
    assert rule.gain(1) == pytest.approx(expected, rel=1e-6)


def test_drafts_that_stand_whatever_is_said_of_them_gain_more() -> None:
    costs = StageCosts(shallow=FLAT, shallow_full=CHEAP, deep=DEEP)
    free = DraftRule(costs, all_stand=True)
    for exited in [True] * 80 + [False] * 20:
        free.decided(exited=exited)
        if exited:
            free.judged(agreed=False)
    assert not free.pause(1)
    assert told(costs, 0.8, 0.0).pause(1)


def test_modes_pause_each_for_itself(make_engine) -> None:
    """What nobody verifies pays where what is verified does not."""
    engine = make_engine(pause_drafting=True)
    rules = engine._rules.drafts
    for mode, pauses in ((AcceptMode.EXACT, True), (AcceptMode.FREE, False)):
        rules.of(mode).pause = lambda sequences, pauses=pauses: pauses
    exact, free = (
        ComputePolicy(mode=m, exit_threshold=0.0) for m in (AcceptMode.EXACT, AcceptMode.FREE)
    )
    run(engine, [request("scout", [3], exact)])
    found = run(engine, [request("e", [1, 2], exact), request("f", [1, 2], free)])
    pages = {name: found[name, 0].last.usage.compute for name in "ef"}
    assert pages["e"].drafted == 0 < pages["f"].drafted


@pytest.mark.parametrize(
    ("deep", "exit_share", "agreed", "sequences", "pause"),
    [
        (DEEP, 0.8, 0.95, 1, False),  # weights are read once for many rows
        (DEEP, 0.8, 0.95, 4, False),
        (STEEP, 0.8, 0.95, 8, True),  # each row costs its full price, exit layers on top
        (DEEP, 0.02, 0.9, 1, True),  # hardly anything exits
        (DEEP, 0.8, 0.1, 8, True),  # hardly anything that exits is right
    ],
)
def test_the_rule(
    deep: CostCurve, exit_share: float, agreed: float, sequences: int, pause: bool
) -> None:
    costs = StageCosts(shallow=FLAT, shallow_full=CHEAP, deep=deep)
    assert told(costs, exit_share, agreed).pause(sequences) is pause


def test_no_judgement_without_evidence() -> None:
    costs = StageCosts(shallow=FLAT, shallow_full=CHEAP, deep=STEEP)
    rule = told(costs, 0.0, 0.0, rows=10)
    assert not rule.pause(8)
    assert told(costs, 0.0, 0.0).pause(8)


class Dice:
    """Pauses at random."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.paused = False

    def pause(self, sequences: int) -> bool:
        self.paused = self._random.random() < 0.6
        return self.paused

    def decided(self, *, exited: bool) -> None: ...

    def judged(self, *, agreed: bool) -> None: ...


def engine_with_dice(make_engine, seed: int, **fields) -> Engine:
    engine = make_engine(pause_drafting=True, **fields)
    rule = Dice(seed)
    engine._rules.drafts._rules = dict.fromkeys(engine._rules.drafts._rules, rule)
    return engine


@pytest.mark.parametrize("seed", range(6))
def test_pauses_at_random_change_no_token(
    make_engine, exit_adapter: Adapter, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few blocks preempt, scouts draft, a lag is caught up in pieces or given up."""
    monkeypatch.setattr(drafting, "_SCOUTS", 3)
    monkeypatch.setattr("fathom.engine.shallow.CATCH_UP_ROWS", 3)
    monkeypatch.setattr("fathom.engine.shallow.MAX_LAG", 12)
    rng = random.Random(seed)
    requests = [
        request(
            f"r{i}",
            [rng.randrange(40) for _ in range(rng.choice([1, 3, 8, 17]))],
            compute=ComputePolicy(mode=AcceptMode.EXACT, exit_threshold=rng.choice([0.0, 0.1])),
            n=rng.choice([1, 1, 2]),
            max_tokens=rng.choice([5, 24, 40]),
            logprobs=rng.choice([None, 2]),
        )
        for i in range(24)
    ]
    blocks = rng.choice([24, 128])
    engine = engine_with_dice(make_engine, seed, num_blocks=blocks, trained=exit_adapter)
    reference = make_engine(num_blocks=256, trained=exit_adapter)
    found, wanted = run(engine, requests), run(reference, requests)
    assert {k: v.ids for k, v in found.items()} == {k: v.ids for k, v in wanted.items()}
    usage = [v.last.usage.compute for v in found.values() if v.last and v.last.usage]
    assert any(page.drafted for page in usage)
    engine.check_integrity()


def test_blocks_of_a_pause_are_not_taken_for_drafting_ones(
    make_engine, exit_adapter: Adapter
) -> None:
    """An answer whose rows the exit layers never saw must not be found as a prefix to draft on."""
    engine = engine_with_dice(make_engine, 0, trained=exit_adapter)
    rule = engine._rules.drafts.of(AcceptMode.EXACT)
    rule.pause = lambda sequences: True
    always = ComputePolicy(exit_threshold=0.0)
    first = run(engine, [request("skip", [9], always), request("a", [1, 2, 3], always)])
    answer = [1, 2, 3, *first["a", 0].ids]
    assert first["a", 0].last.usage.compute.exit_head_rows == 0
    rule.pause = lambda sequences: False
    again = run(engine, [request("b", answer, always)])["b", 0]
    fresh = run(make_engine(trained=exit_adapter), [request("b", answer, always)])["b", 0]
    assert again.ids == fresh.ids
    assert again.depths == fresh.depths  # its drafts are those of right keys


def test_a_prompt_that_comes_in_a_pause_costs_what_it_costs_at_full_depth(
    make_engine, exit_adapter: Adapter
) -> None:
    """Its rows pass no exit layers, and its blocks are found by the next one in the pause."""
    engine = engine_with_dice(make_engine, 0, trained=exit_adapter)
    rule = engine._rules.drafts.of(AcceptMode.EXACT)
    rule.pause = lambda sequences: True
    always = ComputePolicy(exit_threshold=0.0)
    prompt = list(range(1, 18))
    run(engine, [request("scout", [9], always)])
    before = engine.ledger.total.flops
    found = run(engine, [request("a", prompt, always)])["a", 0]
    in_pause = engine.ledger.total.flops - before
    full = make_engine(trained=exit_adapter)
    wanted = run(full, [request("a", prompt, ComputePolicy(mode=AcceptMode.FULL))])["a", 0]
    assert found.ids == wanted.ids
    assert in_pause == full.ledger.total.flops
    again = run(engine, [request("b", prompt, always)])["b", 0]
    assert again.ids == wanted.ids
    assert again.last.usage.cached_tokens > 0


@pytest.mark.parametrize("mode", [AcceptMode.EXACT, AcceptMode.ROLLBACK, AcceptMode.FREE])
def test_scouts_keep_step_with_those_that_pause(make_engine, mode: AcceptMode) -> None:
    """Others must not wait for the one that drafts, nor it fall behind them."""
    steps, drafted = {}, {}
    for paused in (mode, AcceptMode.FULL):
        engine = make_engine(pause_drafting=True)
        rule = engine._rules.drafts.of(mode)
        rule.pause = lambda sequences: True
        policy = ComputePolicy(mode=paused, exit_threshold=0.0)
        for name in ("scout", "other"):
            engine.add_request(request(name, [3, 4], policy, max_tokens=12))
        steps[paused], usages = 0, []
        while engine.has_work():
            usages += [out.usage for out in engine.step() if out.usage is not None]
            steps[paused] += 1
        drafted[paused] = [usage.compute.drafted for usage in usages]
    assert max(drafted[mode]) > min(drafted[mode])  # a prompt's last row may draft in `free`
    assert steps[mode] == steps[AcceptMode.FULL]


def test_a_sequence_that_began_in_a_pause_drafts_after_it(
    make_engine, exit_adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the exit layers have missed is made up for, the prompt included."""
    monkeypatch.setattr("fathom.engine.shallow.CATCH_UP_ROWS", 4)
    engine = engine_with_dice(make_engine, 0, trained=exit_adapter)
    rule = engine._rules.drafts.of(AcceptMode.EXACT)
    rule.pause = lambda sequences: True
    always = ComputePolicy(exit_threshold=0.0)
    run(engine, [request("scout", [9], always)])
    asked = request("a", list(range(1, 18)), always, max_tokens=40)
    engine.add_request(asked)
    for _ in range(6):
        engine.step()
    rule.pause = lambda sequences: False
    found = drain(engine)["a", 0]
    wanted = run(make_engine(trained=exit_adapter), [asked])["a", 0]
    assert wanted.ids[-len(found.ids) :] == found.ids  # the first ones came before the drain
    assert found.last.usage.compute.drafted > 0
    engine.check_integrity()


def test_a_seed_gives_the_same_draws_at_any_load(make_engine, exit_adapter: Adapter) -> None:
    engine = engine_with_dice(make_engine, 1, trained=exit_adapter)
    policy = ComputePolicy(exit_threshold=0.0)
    drawn = request("s", [5, 6], policy, temperature=1.0, seed=7)
    wanted = run(make_engine(trained=exit_adapter), [drawn])
    engine.add_request(drawn)
    found = drain(engine)
    assert found["s", 0].ids == wanted["s", 0].ids
    assert found["s", 0].depths == wanted["s", 0].depths


@pytest.mark.parametrize("mode", [AcceptMode.EXACT, AcceptMode.ROLLBACK, AcceptMode.FREE])
def test_the_default_pauses_where_nothing_exits(make_engine, mode: AcceptMode) -> None:
    """Threshold 1 lets nothing go: after the first rows the exit head is asked no more, but behind
    a prompt where the mode may show a draft at once."""
    engine = make_engine(pause_drafting=True)
    for rule in engine._rules.drafts._rules.values():  # what was measured here says little
        rule._costs = StageCosts(shallow=FLAT, shallow_full=CHEAP, deep=FLAT)
    policy = ComputePolicy(mode=mode, exit_threshold=1.0)
    run(engine, [request("skip", [1], policy, max_tokens=100)])
    found = run(engine, [request("a", [1, 2], policy, max_tokens=100)])
    assert engine.stats()["drafting_paused"] == 1.0
    assert found["a", 0].last.usage.compute.exit_head_rows == (mode is AcceptMode.FREE)
