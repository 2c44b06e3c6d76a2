"""Metrics beside values worked out by hand and beside the libraries that define them."""

from __future__ import annotations

import math
from decimal import Decimal

import numpy as np
import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st

from fathom.evaluation.agreement import agreement, coverage
from fathom.evaluation.bootstrap import interval
from fathom.evaluation.metrics import (
    Statistic,
    bleu,
    exact_match,
    final_number,
    mean,
    perplexity,
    ratio,
    rouge_l,
)
from tests.unit.evaluation.conftest import draft


def value(statistic: Statistic) -> float:
    return float(statistic.combine(statistic.rows.sum(axis=0, keepdims=True))[0])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", "18"),
        ("She makes $1,234.50.", "1234.50"),
        ("from 3 to -7", "-7"),
        ("16-3", "3"),
        ("it is 2.", "2"),
        ("10.0", "10"),
        ("none", None),
        ("", None),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_exact_match_takes_the_last_number() -> None:
    answers = ["3 + 4 = 7", "so 70,000 dollars", "7 or 8", "no idea"]
    references = [("a <<3+4=7>>7\n#### 7",), ("#### 70000",), ("#### 7",), ("#### 1",)]
    assert exact_match(answers, references) == [1, 1, 0, 0]


def test_rouge_l_by_hand() -> None:
    # "the cat sat" and "the dog sat down": the longest common subsequence is "the sat".
    precision, recall = 2 / 3, 2 / 4
    expected = 2 * precision * recall / (precision + recall)
    assert rouge_l(["the cat sat"], [["the dog sat down"]]) == [pytest.approx(expected)]


def test_rouge_l_takes_the_best_reference_and_equal_texts_agree() -> None:
    assert rouge_l(["a b", "", "...", "x"], [["c", "a b"], [""], ["..."], [""]]) == [1, 1, 1, 0]


ANSWERS = [
    "the cat sat on the mat",
    "a man with an orange hat",
    "two dogs run in the snow",
    "people are standing outside",
    "",
]
REFERENCES = [
    ["the cat sat on a mat"],
    ["a man in an orange hat is staring at something"],
    ["two dogs run through the snow"],
    ["people stand outside a building"],
    ["a girl"],
]


def test_bleu_is_sacrebleus() -> None:
    statistic = bleu(ANSWERS, REFERENCES)
    flat = [own[0] for own in REFERENCES]
    expected = sacrebleu.corpus_bleu(ANSWERS, [flat]).score
    assert value(statistic) == pytest.approx(expected)
    # So does a resample: prompts 0, 2 and 2 again.
    sums = statistic.rows[[0, 2, 2]].sum(axis=0, keepdims=True)
    drawn = sacrebleu.corpus_bleu([ANSWERS[i] for i in (0, 2, 2)], [[flat[i] for i in (0, 2, 2)]])
    assert statistic.combine(sums)[0] == pytest.approx(drawn.score)


def test_bleu_interval_is_near_sacrebleus_own() -> None:
    answers, references = ANSWERS * 20, REFERENCES * 20
    found = interval(bleu(answers, references))
    flat = [own[0] for own in references]
    theirs = sacrebleu.BLEU().corpus_score(answers, [flat], n_bootstrap=1000)
    assert found.low < found.value < found.high
    half = (found.high - found.low) / 2
    assert half == pytest.approx(theirs._ci, rel=0.2)


def test_perplexity_and_ratio_by_hand() -> None:
    # 3 tokens at 1/2 and 1 at 1/4: 2^(5/4).
    logs = [3 * math.log(2), math.log(4)]
    assert value(perplexity(logs, [3, 1])) == pytest.approx(2**1.25)
    assert value(ratio([3, 5], [2, 2])) == 2


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_a_means_interval_holds_it(values: list[float]) -> None:
    found = interval(mean(values), resamples=100)
    assert found.low <= found.value <= found.high
    assert found.value == pytest.approx(np.mean(values), abs=1e-6)
    slack = 1e-9 * max(1, *map(abs, values))
    assert min(values) - slack <= found.low
    assert found.high <= max(values) + slack


def test_an_interval_has_the_normal_approximations_width() -> None:
    values = np.random.default_rng(1).normal(5, 2, 400)
    found = interval(mean(list(values)))
    assert found.high - found.low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.15)
    assert interval(mean(list(values))) == found  # seeded


def test_nothing_has_no_interval() -> None:
    assert interval(mean([])).value is None
    assert interval(ratio([0.0], [0])).value is None


def test_agreement_and_coverage_by_hand() -> None:
    # 19 right ones, a wrong one, then a right one that ties with a wrong one, then a wrong one.
    pairs = [(0.9, True)] * 19 + [(0.8, False), (0.7, True), (0.7, False), (0.1, False)]
    drafts = [draft(*pair) for pair in pairs]
    assert agreement(drafts) == pytest.approx(20 / 23)
    # 19 of 20 are right above 0.7; a threshold cannot part the tie.
    assert coverage(drafts, 0.95) == pytest.approx(20 / 23)
    assert coverage(drafts, 1.0) == pytest.approx(19 / 23)
    assert coverage([draft(0.5, False)]) == 0
    assert agreement([]) is None
    assert coverage([]) is None


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.3, 0.6, 0.9]), st.booleans()), min_size=1))
def test_coverage_is_the_best_threshold(pairs: list[tuple[float, bool]]) -> None:
    best = 0.0
    for threshold in (-1.0, 0.1, 0.3, 0.6, 0.9):
        leaving = [agrees for confidence, agrees in pairs if confidence > threshold]
        if leaving and sum(leaving) >= 0.75 * len(leaving):
            best = max(best, len(leaving) / len(pairs))
    assert coverage([draft(*pair) for pair in pairs], 0.75) == pytest.approx(best)
