"""Prompt logprobs: transformers' numbers, whatever the batch, the blocks and the mode."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future

import pytest
import torch
import transformers

from fathom.engine.deep import FlushResult
from fathom.engine.engine import Engine
from fathom.engine.scoring import ROWS_AT_ONCE
from fathom.types import (
    AcceptMode,
    ComputePolicy,
    FinishReason,
    InvalidRequest,
    PolicyName,
    Request,
    RequestOutput,
    SamplingParams,
    Token,
)
from tests.unit.engine.conftest import NUM_LAYERS, request, run_one

ALWAYS = {
    mode: ComputePolicy(mode=mode, policy=PolicyName.ALWAYS, max_stack=4) for mode in AcceptMode
}
MODES = pytest.mark.parametrize("mode", list(AcceptMode))
PROMPT = [(7 * i) % 37 + 3 for i in range(50)]


@pytest.fixture(scope="module")
def peer(model_dir):
    return transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


def scored(
    name: str, prompt: Iterable[int], compute: ComputePolicy | None = None, **fields
) -> Request:
    fields.setdefault("prompt_logprobs", 2)
    return request(name, prompt, compute, **fields)


def drain_news(engine: Engine, requests: Iterable[Request]) -> list[RequestOutput]:
    """All outputs of requests that are added at once; every block comes back."""
    for item in requests:
        engine.add_request(item)
    news: list[RequestOutput] = []
    while engine.has_work():
        news += engine.step()
    engine.check_integrity()
    assert engine.stats()["kv_cache_usage_perc"] == 0
    return news


def prompt_of(news: Iterable[RequestOutput], name: str) -> list[Token]:
    """The one scored prompt of a request, which is on its very first output."""
    own = [out for out in news if out.request_id == name]
    assert own[0].index == 0 and own[0].prompt_tokens is not None
    assert all(out.prompt_tokens is None for out in own[1:])
    return own[0].prompt_tokens


def check_scores(peer, prompt: list[int], tokens: list[Token], num_top: int = 2) -> None:
    assert [token.id for token in tokens] == list(prompt)
    assert {token.depth for token in tokens} == {NUM_LAYERS}
    assert tokens[0].logprob is tokens[0].top_logprobs is None
    with torch.no_grad():
        logits = peer(torch.tensor([prompt])).logits[0, :-1]
    expected = torch.log_softmax(logits, dim=-1)
    chosen = expected.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    assert [t.logprob for t in tokens[1:]] == pytest.approx(chosen.tolist(), abs=1e-4)
    if not num_top:
        assert all(token.top_logprobs is None for token in tokens)
        return
    best = expected.topk(num_top, dim=-1).values.tolist()
    for token, row, values in zip(tokens[1:], expected, best, strict=True):
        assert list(token.top_logprobs.values()) == pytest.approx(values, abs=1e-4)
        for i, logprob in token.top_logprobs.items():
            assert logprob == pytest.approx(float(row[i]), abs=1e-4)


@MODES
@pytest.mark.parametrize("max_rows", [9, 512])
@pytest.mark.parametrize("max_tokens", [0, 1, 20])
def test_scores_are_the_full_models(make_engine, peer, mode, max_rows, max_tokens):
    """In parts of 9 rows and at once, with and without a completion."""
    engine = make_engine(max_num_batched_tokens=max_rows)
    news = drain_news(engine, [scored("a", PROMPT, ALWAYS[mode], max_tokens=max_tokens)])
    check_scores(peer, PROMPT, prompt_of(news, "a"))
    assert news[-1].finish_reason is FinishReason.LENGTH
    tokens = [token.id for out in news for token in out.tokens]
    assert len(tokens) == max_tokens == news[-1].usage.completion_tokens
    if max_tokens:  # scoring changes nothing of the completion
        plain = run_one(make_engine(), request("b", PROMPT, ALWAYS[mode], max_tokens=max_tokens))
        assert tokens == plain.ids
        assert [token.depth for out in news for token in out.tokens] == plain.depths
    else:
        assert len(news) == 1


@pytest.mark.parametrize("num_top", [0, 1, 20])
@pytest.mark.parametrize("length", [1, 2, ROWS_AT_ONCE + 1, ROWS_AT_ONCE + 2])
def test_lengths_and_alternatives(make_engine, peer, num_top, length):
    prompt = (PROMPT * 3)[:length]
    item = scored("a", prompt, prompt_logprobs=num_top, max_tokens=0)
    check_scores(peer, prompt, prompt_of(drain_news(make_engine(), [item]), "a"), num_top)


def test_temperature_filters_and_bias_do_not_touch_the_prompt(make_engine, peer):
    item = scored(
        "a", PROMPT, temperature=1.5, top_k=3, seed=1, logit_bias={5: 50}, repetition_penalty=2.0
    )
    check_scores(peer, PROMPT, prompt_of(drain_news(make_engine(), [item]), "a"))


@pytest.mark.parametrize("num_blocks", [20, 256])
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_a_batch_of_all_kinds(make_engine, peer, num_blocks, prefix_caching):
    """Modes, lengths and unscored requests side by side; with 20 blocks, some are preempted."""
    engine = make_engine(
        num_blocks=num_blocks, max_num_batched_tokens=16, prefix_caching=prefix_caching
    )
    requests, prompts, plain = [], {}, {}
    for i in range(24):
        name, mode = f"r{i}", list(AcceptMode)[i % 4]
        prompt = PROMPT[: 5 + 7 * (i % 7)]  # beginnings of one another
        max_tokens = (0, 1, 30)[i % 3]
        if i % 5 == 4:
            plain[name] = request(name, prompt, ALWAYS[mode], max_tokens=30)
            requests.append(plain[name])
            continue
        prompts[name] = prompt
        requests.append(scored(name, prompt, ALWAYS[mode], max_tokens=max_tokens))
    news = drain_news(engine, requests)
    assert (engine.ledger.total.preemptions > 0) == (num_blocks == 20)
    for name, prompt in prompts.items():
        check_scores(peer, prompt, prompt_of(news, name))
    for name, item in plain.items():
        own = [out for out in news if out.request_id == name]
        assert all(out.prompt_tokens is None for out in own)
        ids = [token.id for out in own for token in out.tokens]
        assert ids == run_one(make_engine(), item).ids


@MODES
def test_preempted_between_two_parts(make_engine, peer, mode):
    engine = make_engine(max_num_batched_tokens=9)
    engine.add_request(scored("a", PROMPT, ALWAYS[mode], max_tokens=3))
    (seq,) = engine._completions.families["a"]
    while seq.deep_len < 20:
        engine.step()
    assert 0 < seq.scores.num_rows < len(PROMPT) - 1
    engine._scheduler.preempt(seq)
    news: list[RequestOutput] = []
    while engine.has_work():
        news += engine.step()
    check_scores(peer, PROMPT, prompt_of(news, "a"))
    assert sum(len(out.tokens) for out in news) == 3


def test_cached_blocks_are_not_used_but_left_for_others(make_engine, peer):
    engine = make_engine()
    usage = {}
    for name, make in (("a", scored), ("b", scored), ("c", request)):
        news = drain_news(engine, [make(name, PROMPT, max_tokens=0 if name == "a" else 2)])
        usage[name] = news[-1].usage
        if make is scored:
            check_scores(peer, PROMPT, prompt_of(news, name))
    assert [usage[name].cached_tokens for name in "abc"] == [0, 0, 48]


@pytest.mark.parametrize("max_tokens", [0, 5])
@MODES
def test_only_the_first_completion_carries_the_prompt(make_engine, peer, mode, max_tokens):
    engine = make_engine()
    item = scored("a", PROMPT, ALWAYS[mode], n=3, max_tokens=max_tokens, temperature=1, seed=3)
    news = drain_news(engine, [item])
    check_scores(peer, PROMPT, prompt_of(news, "a"))
    ends = [out for out in news if out.finish_reason]
    assert sorted(out.index for out in ends) == [0, 1, 2]
    assert {out.finish_reason for out in ends} == {FinishReason.LENGTH}
    assert {out.usage.completion_tokens for out in ends} == {max_tokens}


def test_a_cancelled_prompt_has_no_scores(make_engine):
    engine = make_engine(max_num_batched_tokens=9)
    engine.add_request(scored("a", PROMPT, max_tokens=0))
    for _ in range(7):
        assert engine.step() == []
    engine.cancel("a")
    (out,) = engine.step()
    assert out.finish_reason is FinishReason.CANCELLED
    assert out.prompt_tokens is None
    assert not engine.has_work()
    engine.check_integrity()


class _Poisoned:
    """A deep stage whose logits for one sequence are not finite."""

    def __init__(self, inner, seq_id: int) -> None:
        self._inner = inner
        self._seq_id = seq_id
        self.may_be_lost = inner.may_be_lost

    @property
    def cache(self):
        return self._inner.cache

    def flush(self, items):
        result = self._inner.flush(items).result()
        logits = result.logits.clone()
        row = 0
        for item in items:
            if item.seq_id == self._seq_id and item.num_outputs:
                logits[row, 3] = float("nan")
            row += item.num_outputs
        future: Future[FlushResult] = Future()
        best, argmax = (values.tolist() for values in logits.max(dim=-1))
        future.set_result(FlushResult(best, argmax, result.logprobs, logits))
        return future

    def reopen(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize("max_rows", [9, 512])
def test_logits_that_are_not_finite_end_that_request_alone(make_engine, peer, max_rows):
    engine = make_engine(wrap_deep=lambda deep: _Poisoned(deep, 0), max_num_batched_tokens=max_rows)
    news = drain_news(engine, [scored("a", PROMPT), scored("b", PROMPT)])
    (out,) = [out for out in news if out.request_id == "a"]
    assert out.finish_reason is FinishReason.ERROR
    assert "not finite" in out.error
    assert out.prompt_tokens is None
    check_scores(peer, PROMPT, prompt_of(news, "b"))


def test_lm_head_rows_are_accounted_for(make_engine):
    engine = make_engine(max_num_batched_tokens=9)
    news = drain_news(engine, [scored("a", PROMPT, max_tokens=0)])
    assert news[0].usage.compute.lm_head_rows == len(PROMPT)  # the last row decides, as ever
    news = drain_news(
        engine, [request("b", PROMPT, ComputePolicy(mode=AcceptMode.FULL), max_tokens=1)]
    )
    assert news[-1].usage.compute.lm_head_rows == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": True}, "prompt_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1, "prompt_logprobs": 0}, "max_tokens"),
        ({"max_tokens": 0, "min_tokens": 1, "prompt_logprobs": 0}, "min_tokens"),
    ],
)
def test_ranges(fields, param):
    SamplingParams(max_tokens=0, prompt_logprobs=0).validate()
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**fields).validate()
    assert caught.value.param == param
