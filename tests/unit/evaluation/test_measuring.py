"""Measuring through the engine: what is scored and cut, and how answers become rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from fathom.engine.engine import Engine
from fathom.engine.trace import DraftRecord
from fathom.evaluation.agreement import Drafts
from fathom.evaluation.answers import generate, log_likelihoods, requests_for
from fathom.evaluation.encode import Scored, encode_choice, encode_item, encode_windows
from fathom.evaluation.errors import EvaluationError
from fathom.evaluation.generation import measure_generation
from fathom.evaluation.partial import Partial
from fathom.evaluation.points import read_points
from fathom.evaluation.probe import traced_drafts
from fathom.evaluation.run import evaluate, load
from fathom.evaluation.scoring import measure_choices
from fathom.evaluation.session import Session
from fathom.evaluation.tasks import TASKS, ChoiceItem, ChoiceTask, GenerationTask, Item
from fathom.types import AcceptMode, ComputePolicy, PolicyName, Request
from tests.unit.evaluation.conftest import draft

MODES = {
    "full": ComputePolicy(mode=AcceptMode.FULL),
    "free": ComputePolicy(mode=AcceptMode.FREE, policy=PolicyName.FORCED, forced_exit_rate=0.5),
}


def session_of(engine: Engine, partial: Partial | None = None, **fields) -> Session:
    return Session(
        engine=engine,
        partial=Partial(None, {}) if partial is None else partial,
        policies=MODES,
        block=2,
        progress=lambda label, total: lambda: None,
        **fields,
    )


def generation(name: str) -> GenerationTask:
    task = TASKS[name]
    assert isinstance(task, GenerationTask)
    return task


@pytest.fixture(scope="session")
def reference(tiny_model: Path) -> Callable[[Scored], float]:
    """transformers' log-likelihood of a text's scored tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)

    @torch.no_grad()
    def score(text: Scored) -> float:
        logprobs = model(torch.tensor([text.ids])).logits[0].log_softmax(-1)
        return sum(float(logprobs[i - 1, text.ids[i]]) for i in range(text.first, len(text.ids)))

    return score


def test_log_likelihoods_are_transformers(engine: Engine, reference: Callable) -> None:
    texts = [Scored(tuple(b"a short text"), 1), Scored(tuple(range(60)), 50)]
    found = log_likelihoods(engine, texts, lambda: None)
    assert [count for _, count in found] == [11, 10]
    for text, (total, _) in zip(texts, found, strict=True):
        assert total == pytest.approx(reference(text), abs=1e-3)


def test_choices_take_the_likeliest(engine: Engine, reference: Callable) -> None:
    items = [
        ChoiceItem(f"x:{i}", (f"Question {i}",) * 2, ("no" * (i + 1), "yes, surely"), i % 2)
        for i in range(6)
    ]
    task = TASKS["boolq"]
    assert isinstance(task, ChoiceTask)
    rows = {row["metric"]: row for row in measure_choices(session_of(engine), task, items)}
    right, right_norm = 0, 0
    for item in items:
        texts, cut = encode_choice(engine.tokenizer, item, 100)
        assert not cut
        assert [len(text.ids) - text.first for text in texts] == [
            len(" " + choice) for choice in item.continuations
        ]
        totals = [reference(text) for text in texts]
        norm = [t / len(c) for t, c in zip(totals, item.continuations, strict=True)]
        right += totals.index(max(totals)) == item.gold
        right_norm += norm.index(max(norm)) == item.gold
    assert rows["acc"]["value"] == pytest.approx(right / 6)
    assert rows["acc_norm"]["value"] == pytest.approx(right_norm / 6)
    assert rows["acc"]["speedup_over_full"] is None


def test_a_long_choice_loses_the_start_of_its_context(engine: Engine) -> None:
    item = ChoiceItem("x:1", ("abcdefgh",) * 2, ("yes", "no"), 0)
    (yes, no), cut = encode_choice(engine.tokenizer, item, 8)
    assert cut
    tokenizer = engine.tokenizer
    assert tokenizer.decode(yes.ids) == "efgh yes"
    assert tokenizer.decode(yes.ids[yes.first :]) == " yes"
    assert tokenizer.decode(no.ids) == "defgh no"


def test_blanks_that_end_a_context_are_the_choices(engine: Engine) -> None:
    item = ChoiceItem("x:1", ("Why? \n",) * 2, ("a", "bc"), 0)
    texts, _ = encode_choice(engine.tokenizer, item, 100)
    scored = [engine.tokenizer.decode(text.ids[text.first :]) for text in texts]
    assert scored == [" \n a", " \n bc"]


def test_a_long_prompt_loses_the_end_of_its_text(engine: Engine) -> None:
    task = generation("dialogsum")
    tokenizer = engine.tokenizer
    long = Item("x:1", "dialogsum", "é" * 200)
    ids, cut = encode_item(tokenizer, task, long, 100)
    assert cut
    assert 95 <= len(ids) <= 100
    text = tokenizer.decode(ids)
    assert text.startswith("<|user|>Summarize the following conversation.\n\né")
    assert text.endswith("\n<|assistant|>")
    with pytest.raises(EvaluationError, match="x:1: the prompt does not fit into the 20 tokens"):
        encode_item(tokenizer, task, long, 20)


def test_windows_do_not_overlap(engine: Engine) -> None:
    text = "abcdefghijk"
    windows = encode_windows(engine.tokenizer, text, 4, 100, None)
    assert [engine.tokenizer.decode(w.ids) for w in windows] == ["abcd", "efgh", "ijk"]
    assert len(encode_windows(engine.tokenizer, text, 4, 3, 2)) == 2


def test_rows_of_a_task_and_its_probe(engine: Engine) -> None:
    asked: list[Request] = []

    def probe(engine: Engine, requests) -> Drafts:
        asked.extend(requests)
        return [draft(0.9, True), draft(0.2, False)]

    items = [Item(f"x:{i}", "gsm8k", f"{i}?", (f"#### {i}",)) for i in range(5)]
    session = session_of(engine, runs=2, new_tokens=8, probe=probe)
    rows = measure_generation(session, generation("gsm8k"), items)
    assert [(row["mode"], row["metric"]) for row in rows] == [
        ("full", "exact_match"), ("full", "nll_under_full"), ("free", "exact_match"),
        ("free", "rougeL_to_full"), ("free", "nll_under_full"),
    ]  # fmt: skip
    assert len(asked) == 5
    assert all(r.compute.mode == "full" and r.sampling.max_tokens == 8 for r in asked)
    assert [row["agreement"] for row in rows] == [None, None, 0.5, 0.5, 0.5]
    assert [row["coverage_at_precision_95"] for row in rows][2:] == [0.5] * 3
    assert rows[0]["speedup_over_full"] == 1
    assert rows[0]["layers_per_token"] == 4
    assert session.truncated == {"gsm8k": 0}


def test_the_engines_probe_asks_at_every_token(engine: Engine) -> None:
    requests = requests_for([tuple(b"ab"), tuple(b"cde")], MODES["full"], 8)
    answers, _ = generate(engine, requests, lambda: None)
    drafts = traced_drafts(engine, requests)
    assert len(drafts) == sum(len(answer.token_ids) for answer in answers)
    assert all(0 <= draft.confidence <= 1 for draft in drafts)


def test_random_exits_come_at_the_rate_of_the_point_before(engine: Engine) -> None:
    compute = ComputePolicy(policy=PolicyName.FORCED, forced_exit_rate=0.7)
    points = read_points(["free", "random", "static"], compute)
    items = [Item(f"x:{i}", "multi30k", f"{i}", ("a",)) for i in range(12)]
    session = session_of(engine, new_tokens=24)
    session.policies, session.block = points, 6
    rows = measure_generation(session, generation("multi30k"), items)
    rates = {row["mode"]: row["exit_rate"] for row in rows}
    assert rates["random"] == pytest.approx(rates["free"], abs=0.1)
    assert 0.5 < rates["free"] < 0.8
    # The first of 24 tokens comes with the prompt at full depth, 4 layers; 23 leave after 2.
    layers = {row["mode"]: row["layers_per_token"] for row in rows}
    assert layers["static"] == pytest.approx((4 + 23 * 2) / 24)
    assert rates["static"] == pytest.approx(23 / 24)


def test_points_are_modes_at_thresholds() -> None:
    points = read_points(["free@0.25", "exact", "copy"], ComputePolicy(max_stack=3))
    assert list(points) == ["full", "free@0.25", "exact", "copy"]
    assert points["free@0.25"].exit_threshold == 0.25
    assert {point.max_stack for point in points.values()} == {3}
    for names, message in (
        (["deep"], "must be a list of full, exact, rollback, free, copy, static, random"),
        (["free@2"], "threshold of 'free@2' must be a number from 0 to 1"),
        (["free@"], "threshold of 'free@' must be a number from 0 to 1"),
        (["full@0.5"], "nothing exits in mode full, so write full, not full@0.5"),
        (["random", "free"], "name free, or free@X, before it"),
    ):
        with pytest.raises(EvaluationError, match=message):
            read_points(names, ComputePolicy())


def test_the_trace_of_an_evaluation_is_whole_after_an_interruption(
    engine: Engine, tmp_path: Path
) -> None:
    items = [Item(f"x:{i}", "multi30k", f"{i}", ("a",)) for i in range(5)]
    task = generation("multi30k")
    seen: list[list[DraftRecord]] = []
    for _ in range(2):  # the second finds all that the first has kept
        seen.append([])
        partial = Partial(tmp_path / "partial", {})
        session = session_of(
            engine, partial, new_tokens=4, probe=traced_drafts, on_draft=seen[-1].append
        )
        rows = measure_generation(session, task, items)
    assert seen[0] == seen[1]
    assert {record.request_id for record in seen[0]} == {f"multi30k/{i}" for i in range(5)}
    share = sum(record.agrees for record in seen[0]) / len(seen[0])
    assert rows[-1]["agreement"] == share


def test_what_is_kept_is_not_measured_again(engine: Engine, tmp_path: Path) -> None:
    items = [Item(f"x:{i}", "multi30k", f"{i}", ("a",)) for i in range(5)]
    path = tmp_path / "partial"
    task = generation("multi30k")
    rows = measure_generation(session_of(engine, Partial(path, {}), new_tokens=4), task, items)
    before = engine.ledger.total.decided
    labels: Counter[str] = Counter()

    def progress(label: str, total: int) -> Callable[[], None]:
        labels[label] -= total
        return lambda: labels.update([label])

    session = session_of(engine, Partial(path, {}), new_tokens=4)
    session.progress = progress
    assert measure_generation(session, task, items) == rows
    assert engine.ledger.total.decided == before
    assert set(labels.values()) == {0}  # every bar reached its end


def test_a_whole_evaluation(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "w.txt").write_text("word " * 60)
    (tmp_path / "c.jsonl").write_text('{"query": "q", "choices": ["a", "b"], "gold": 0}\n')
    (tmp_path / "s.jsonl").write_text('{"category": "qa", "turns": ["Why?"]}\n')
    loads = [
        load(TASKS[name], tmp_path / file, None)
        for name, file in (("wikitext2", "w.txt"), ("copa", "c.jsonl"), ("spec_bench", "s.jsonl"))
    ]
    rows = [row for found in evaluate(session_of(engine, new_tokens=4), loads) for row in found]
    assert [(row["task"], row["mode"], row["metric"]) for row in rows] == [
        ("wikitext2", "full", "perplexity"),
        ("copa", "full", "acc_norm"),
        ("copa", "full", "acc"),
        ("spec_bench/qa", "full", None),
        ("spec_bench/qa", "free", None),
        ("spec_bench", "full", None),
        ("spec_bench", "free", None),
    ]
