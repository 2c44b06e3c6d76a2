"""From our requests to vLLM's parameters, and back, without vLLM."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from fathom.compute import ComputePolicy
from fathom.engine.info import EngineInfo
from fathom.types import InvalidRequest, Request, Resumed, SamplingParams, Token
from fathom.vllm.convert import (
    check_compute,
    check_resumption,
    sampling_arguments,
    scored_prompt,
    tokens_of,
)

INFO = EngineInfo(
    model="m", adapter="", adapter_digest="", num_layers=4, exit_layer=4, exit_depth=4,
    exit_vocab=0, vocab_size=1000, max_model_len=64, dtype="float32", eos_token_ids=(2, 3),
    weights_digest="w", num_blocks=8, block_size=16,
)  # fmt: skip
FULL = ComputePolicy(mode="full")  # type: ignore[arg-type]


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None


def request(**settings: Any) -> Request:
    own = {"request_id": "r", "prompt_token_ids": (5, 6, 7), "compute": FULL, **settings}
    return Request(**own)


def arguments(index: int = 0, given: Resumed = Resumed(), **params: Any) -> dict[str, Any]:
    return sampling_arguments(request(sampling=SamplingParams(**params)), index, INFO, given)


def test_every_sampling_parameter_gets_there() -> None:
    params = SamplingParams(
        max_tokens=20, min_tokens=3, temperature=0.7, top_p=0.9, top_k=40, min_p=0.05, seed=11,
        stop_token_ids=(9, 2), logprobs=5, prompt_logprobs=2, presence_penalty=0.5,
        frequency_penalty=-0.5, repetition_penalty=1.1, logit_bias={4: -3.0},
    )  # fmt: skip
    found = sampling_arguments(request(sampling=params), 0, INFO)
    assert found == {
        "max_tokens": 20, "min_tokens": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 40,
        "min_p": 0.05, "seed": 11, "ignore_eos": True, "stop_token_ids": [2, 3, 9], "logprobs": 5,
        "prompt_logprobs": 2, "presence_penalty": 0.5, "frequency_penalty": -0.5,
        "repetition_penalty": 1.1, "logit_bias": {4: -3.0}, "detokenize": False,
    }  # fmt: skip


def test_tokens_that_end_it_are_the_models_unless_ignored() -> None:
    assert arguments()["stop_token_ids"] == [2, 3]
    assert arguments(ignore_eos=True)["stop_token_ids"] == []
    assert arguments(ignore_eos=True, stop_token_ids=(8,))["stop_token_ids"] == [8]


def test_completions_have_seeds_of_their_own_and_one_scores_the_prompt() -> None:
    found = [arguments(index, seed=7, prompt_logprobs=1) for index in range(3)]
    assert [each["seed"] for each in found] == [7, 8, 9]
    assert [each["prompt_logprobs"] for each in found] == [1, None, None]
    assert arguments(seed=None)["seed"] is None
    for seed in (-1, -(2**63), 2**63 - 1):  # torch takes none below 0, and vLLM reads -1 as none
        assert 0 <= arguments(1, seed=seed)["seed"] < 2**63


def test_length_ends_at_the_models_and_scoring_makes_a_token() -> None:
    assert arguments(max_tokens=500)["max_tokens"] == 61
    assert arguments(max_tokens=0, prompt_logprobs=0)["max_tokens"] == 1


def test_what_was_given_before_a_loss_is_not_asked_for_again() -> None:
    given = Resumed((10, 11, 12), (4, 4, 4))
    found = arguments(given=given, max_tokens=10, min_tokens=5, seed=7, prompt_logprobs=1)
    assert (found["max_tokens"], found["min_tokens"]) == (7, 2)
    assert found["prompt_logprobs"] is None
    assert found["seed"] not in (7, None)
    assert arguments(given=given, max_tokens=10, min_tokens=2)["min_tokens"] == 0


def test_penalties_that_would_forget_tokens_are_refused() -> None:
    params = SamplingParams(presence_penalty=0.5)
    check_resumption(request(sampling=params))
    check_resumption(request(sampling=params, resumed=(Resumed(),)))
    with pytest.raises(InvalidRequest, match=r"presence_penalty must be 0 .* got 0\.5"):
        check_resumption(request(sampling=params, resumed=(Resumed((1,), (4,)),)))


@pytest.mark.parametrize("mode", ["exact", "rollback", "free", "copy"])
def test_modes_other_than_full_are_refused(mode: str) -> None:
    with pytest.raises(
        InvalidRequest, match=f"compute.mode must be full .* got '{mode}'"
    ) as caught:
        check_compute(replace(FULL, mode=mode))  # type: ignore[arg-type]
    assert caught.value.param == "compute.mode"
    check_compute(FULL)


def test_tokens_have_full_depth_and_their_alternatives_best_first() -> None:
    assert tokens_of([8, 9], None, None, 4) == [Token(8, 4), Token(9, 4)]
    # vLLM puts the chosen token first, whatever its rank.
    scores = {8: Logprob(-3.0, 7), 6: Logprob(-1.5, 2), 5: Logprob(-0.5, 1)}
    (token,) = tokens_of([8], [scores], 2, 4)
    assert (token.id, token.depth, token.logprob) == (8, 4, -3.0)
    assert list(token.top_logprobs.items()) == [(5, -0.5), (6, -1.5)]
    (token,) = tokens_of([5], [scores], 1, 4)
    assert token.top_logprobs == {5: -0.5}
    assert tokens_of([8], [{8: Logprob(-3.0, 7)}], 0, 4) == [Token(8, 4, -3.0)]


def test_a_prompts_first_token_has_no_score() -> None:
    found = scored_prompt((5, 6), [None, {6: Logprob(-2.0, 3), 1: Logprob(-0.1, 1)}], 1, 4)
    assert found == [Token(5, 4), Token(6, 4, -2.0, {1: -0.1})]
