"""What the engine notes of completions in the shadow, against transformers, and what it changes."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from deployments.shadow import score
from fathom.engine.async_engine import AsyncEngine
from fathom.engine.engine import Engine
from fathom.exits import shadow
from fathom.exits.shadow import Shadowed, ShadowLog, Unread
from fathom.types import AcceptMode, ComputePolicy, Request, Resumed
from tests.unit.engine.conftest import EXIT_LAYER, NUM_LAYERS, Completion, request, run

PROMPTS = [[5, 6, 7], [9, 8], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3], list(range(3, 20))]


def settings(mode: AcceptMode, **fields: object) -> ComputePolicy:
    fields.setdefault("exit_threshold", 0.02)
    return ComputePolicy(mode=mode, operating_point="point", **fields)


def requests(compute: ComputePolicy, **sampling: object) -> list[Request]:
    return [
        request(f"r{number}", prompt, compute, **sampling) for number, prompt in enumerate(PROMPTS)
    ]


def shadowed(engine: Engine, items: list[Request]) -> tuple[list[Completion], list[Shadowed]]:
    """Run requests one after the other with all of them in the shadow."""
    engine.shadow = ShadowLog(1.0)
    done = [run(engine, [item])[item.request_id, 0] for item in items]
    return done, engine.shadow.drain()


@pytest.fixture(scope="module")
def oracle(model_dir: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def wrong_tokens(
    oracle: transformers.PreTrainedModel, prompt: list[int], completion: Completion
) -> int:
    """Tokens decided at the exit that are not the full model's choice after the same text."""
    text = [*prompt, *completion.ids]
    with torch.no_grad():
        best = oracle(torch.tensor([text])).logits[0].argmax(-1).tolist()
    return sum(
        depth < NUM_LAYERS and token != best[len(prompt) + place - 1]
        for place, (token, depth) in enumerate(zip(completion.ids, completion.depths, strict=True))
    )


@pytest.mark.parametrize("mode", [AcceptMode.FREE, AcceptMode.ROLLBACK, AcceptMode.EXACT])
def test_flushes_say_what_the_full_model_does(make_engine, oracle, mode: AcceptMode) -> None:
    done, found = shadowed(make_engine(), requests(settings(mode, rollback_nats=3.7)))
    assert len(found) == len(PROMPTS)
    for prompt, each, told in zip(PROMPTS, done, found, strict=True):
        assert told.wrong == wrong_tokens(oracle, prompt, each)
        assert told.exited == sum(depth == EXIT_LAYER for depth in each.depths)
        assert (told.decided, told.point, told.unread) == (24, "point", None)
        assert sum(told.rows) == told.asked
        assert all(a <= b for a, b in zip(told.agreed, told.rows, strict=True))
        assert each.last is not None and each.last.usage is not None
        page = each.last.usage.compute
        assert told.layer_tokens == page.shallow_layer_tokens + page.deep_layer_tokens
        assert told.check_layer_tokens == 0
    wrong = sum(told.wrong for told in found)
    assert (wrong == 0) is (mode is AcceptMode.EXACT)


def test_mode_copy_is_scored_after_its_end(make_engine, oracle) -> None:
    engine = make_engine()
    done, found = shadowed(engine, requests(settings(AcceptMode.COPY)))
    assert all(told.unread is not None for told in found)
    assert sum(told.exited for told in found) > 20
    running = AsyncEngine(engine)
    try:
        for told in found:
            asyncio.run(score(running, told))
    finally:
        asyncio.run(running.shutdown())
    for prompt, each, told in zip(PROMPTS, done, found, strict=True):
        assert told.unread is None
        assert told.wrong == wrong_tokens(oracle, prompt, each)
        # Each row of the text passes every layer once; the last one predicts nothing.
        rows = len(prompt) + 24
        assert told.check_layer_tokens in (NUM_LAYERS * rows, NUM_LAYERS * (rows - 1))
        assert sum(told.agreed) == 0
    assert sum(told.wrong for told in found) > 0


def test_a_text_as_long_as_the_model_allows_is_scored(make_engine) -> None:
    engine = make_engine()
    length = engine.info.max_model_len
    item = request("long", [5, 6, 7], settings(AcceptMode.COPY), max_tokens=length)
    _, (told,) = shadowed(engine, [item])
    assert told.unread is not None and len(told.unread.tokens) == length
    running = AsyncEngine(engine)
    try:
        asyncio.run(score(running, told))
    finally:
        asyncio.run(running.shutdown())
    assert told.unread is None


@pytest.mark.parametrize("mode", list(AcceptMode))
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_shadow_changes_no_answer(make_engine, mode: AcceptMode, temperature: float) -> None:
    items = requests(settings(mode), temperature=temperature, seed=3)
    plain = run(make_engine(), items)
    engine = make_engine()
    engine.shadow = ShadowLog(1.0)
    watched = run(engine, items)
    for key, each in plain.items():
        assert watched[key].ids == each.ids
        assert watched[key].depths == each.depths
    count = len(engine.shadow.drain())
    no_text = mode is AcceptMode.COPY and temperature > 0
    assert count == (0 if mode is AcceptMode.FULL or no_text else len(items))


def test_a_completion_in_the_shadow_drafts_in_a_pause(make_engine) -> None:
    items = requests(settings(AcceptMode.EXACT), max_tokens=40)
    full = run(make_engine(), requests(ComputePolicy(mode=AcceptMode.FULL), max_tokens=40))
    engine = make_engine(pause_drafting=True)
    assert engine._rules.drafts is not None
    rule = engine._rules.drafts.of(AcceptMode.EXACT)
    assert rule is not None
    rule.pause = lambda sequences: True  # type: ignore[method-assign]
    run(engine, [request("scout", [5], settings(AcceptMode.EXACT))])  # the only one of 32
    engine.shadow = ShadowLog(0.0)
    run(engine, items)
    assert engine.shadow.drain() == []
    done, found = shadowed(engine, items)
    assert all(told.asked >= 30 for told in found)
    assert [each.ids for each in done] == [full[item.request_id, 0].ids for item in items]


def test_off_nothing_is_noted(make_engine) -> None:
    engine = make_engine()
    (item,) = requests(settings(AcceptMode.FREE))[:1]
    engine.add_request(item)
    assert engine._completions.families[item.request_id][0].shadow is None
    engine.cancel(item.request_id)


def test_completions_cut_short_or_resumed_are_left_out(make_engine) -> None:
    engine = make_engine()
    engine.shadow = ShadowLog(1.0)
    item = requests(settings(AcceptMode.FREE))[0]
    engine.add_request(item)
    engine.step()
    engine.cancel(item.request_id)
    engine.step()
    resumed = dataclasses.replace(item, resumed=(Resumed((5, 6), (EXIT_LAYER, NUM_LAYERS)),))
    run(engine, [resumed])
    assert engine.shadow.drain() == []


def test_a_share_of_the_completions_is_picked_by_name() -> None:
    free = ComputePolicy(mode=AcceptMode.FREE)
    log = ShadowLog(0.1)
    picked = [log.picks(f"chatcmpl-{n}", 0, free) for n in range(5000)]
    assert abs(np.mean(picked) - 0.1) < 5 * np.sqrt(0.09 / 5000)
    assert picked == [ShadowLog(0.1).picks(f"chatcmpl-{n}", 0, free) for n in range(5000)]
    assert len({log.picks("one", index, free) for index in range(100)}) == 2
    assert not ShadowLog(1.0).picks("one", 0, ComputePolicy(mode=AcceptMode.FULL))
    assert not any(ShadowLog(0.0).picks(f"{n}", 0, free) for n in range(100))
    assert all(ShadowLog(1.0).picks(f"{n}", 0, free) for n in range(100))


def test_what_was_not_asked_about_is_not_wrong() -> None:
    told = Shadowed("", ComputePolicy(), unread=Unread((1, 2, 3, 4, 5), (1, 2, 3)))
    told.settle([None, 9, 3, 9, None], 20)
    assert (told.wrong, told.check_layer_tokens, told.unread) == (1, 20, None)


def test_nobody_need_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadow, "_MOST_KEPT", 3)
    log = ShadowLog(1.0)
    for number in range(5):
        log.add(Shadowed(str(number), ComputePolicy()))
    assert [each.point for each in log.drain()] == ["2", "3", "4"]
    assert log.dropped == 2
    assert log.drain() == []
