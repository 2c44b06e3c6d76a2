"""Sampling: filters against plain definitions, penalties against OpenAI's and transformers'."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from fathom.engine import sampling
from fathom.engine.random import Draw, uniform
from fathom.types import SamplingParams

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0, 0.0])
rows = st.lists(st.floats(-8, 8), min_size=2, max_size=12).map(torch.tensor)


@given(rows, st.floats(0.1, 1.0))
def test_top_p_keeps_the_smallest_set_with_the_mass(logits, top_p):
    probs = sampling.distribution(logits, SamplingParams(temperature=1.0, top_p=top_p))
    whole = torch.softmax(logits.double(), dim=-1)
    kept = probs > 0
    assert float(whole[kept].sum()) >= top_p - 1e-9
    smallest = float(whole[kept].min())
    assert float(whole[kept].sum()) - smallest < top_p
    assert float(probs.sum()) == pytest.approx(1.0)


@given(rows, st.integers(1, 12))
def test_top_k_keeps_k_tokens_or_ties(logits, k):
    probs = sampling.distribution(logits, SamplingParams(temperature=1.0, top_k=k))
    kept = int((probs > 0).sum())
    assert kept >= min(k, len(logits))
    if len(set(logits.tolist())) == len(logits):
        assert kept == min(k, len(logits))


@given(rows, st.floats(0.0, 1.0))
def test_min_p_cuts_relative_to_the_best(logits, min_p):
    probs = sampling.distribution(logits, SamplingParams(temperature=1.0, min_p=min_p))
    whole = torch.softmax(logits.double(), dim=-1)
    assert torch.equal(probs > 0, whole >= min_p * whole.max())


def test_temperature_scales_the_logits():
    probs = sampling.distribution(LOGITS, SamplingParams(temperature=0.5))
    torch.testing.assert_close(probs, torch.softmax(LOGITS.double() / 0.5, dim=-1))


def test_penalties_follow_their_definitions():
    params = SamplingParams(
        presence_penalty=0.5, frequency_penalty=0.25, logit_bias={3: 7.0}, max_tokens=9
    )
    adjusted = sampling.adjust(LOGITS, params, [4], [0, 0, 1], [])
    expected = LOGITS.clone()
    expected[0] -= 0.5 + 2 * 0.25
    expected[1] -= 0.5 + 0.25
    expected[3] += 7.0
    torch.testing.assert_close(adjusted, expected)
    assert torch.equal(LOGITS, torch.tensor([2.0, 1.0, 0.5, -1.0, 0.0]))


def test_repetition_penalty_is_transformers():
    params = SamplingParams(repetition_penalty=1.7)
    adjusted = sampling.adjust(LOGITS, params, [3], [0], [])
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.7)
    torch.testing.assert_close(adjusted, processor(torch.tensor([[3, 0]]), LOGITS[None].clone())[0])


def test_min_tokens_masks_the_stop_tokens():
    params = SamplingParams(min_tokens=2)
    assert torch.isneginf(sampling.adjust(LOGITS, params, [1], [4], [0, 2])[[0, 2]]).all()
    assert torch.isfinite(sampling.adjust(LOGITS, params, [1], [4, 4], [0, 2])).all()


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=8).filter(lambda p: sum(p) > 0.01),
    st.floats(0, 1, exclude_max=True),
)
def test_a_draw_inverts_the_cumulative_distribution(masses, u):
    probs = torch.tensor(masses, dtype=torch.float64)
    token = sampling.draw(probs, u)
    assert masses[token] > 0
    before, total = sum(masses[:token]), sum(masses)
    assert before <= u * total + 1e-9
    assert u * total <= before + masses[token] + 1e-9


def test_draws_are_uniform_and_separate():
    draws = [uniform(7, position, 0, Draw.DRAFT) for position in range(2000)]
    assert 0.47 < sum(draws) / len(draws) < 0.53
    assert uniform(7, 1, 0, Draw.DRAFT) == draws[1]
    others = {
        uniform(8, 1, 0, Draw.DRAFT),
        uniform(7, 1, 1, Draw.DRAFT),
        uniform(7, 1, 0, Draw.ACCEPT),
        uniform(-7, 1, 0, Draw.DRAFT),
    }
    assert draws[1] not in others and len(others) == 4


def test_logprobs_are_log_probabilities_best_first():
    logprob, top = sampling.logprobs_of(LOGITS, 1, 2)
    scores = torch.log_softmax(LOGITS, dim=-1)
    assert logprob == pytest.approx(float(scores[1]))
    assert list(top) == [0, 1]
    assert sampling.logprobs_of(LOGITS, 1, 0)[1] is None
