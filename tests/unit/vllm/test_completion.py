"""One completion at vLLM: its end, its text, its usage, from what vLLM says piece by piece."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fathom.compute import ComputePolicy
from fathom.config import EngineConfig
from fathom.engine.info import EngineInfo
from fathom.ledger import Ledger
from fathom.types import FinishReason, Request, RequestOutput, Resumed, SamplingParams
from fathom.vllm.completion import Completion
from fathom.vllm.figures import Figures
from fathom.vllm.start import costs_of
from tests.unit.vllm.test_settings import MODEL

INFO = EngineInfo(
    model="m", adapter="", adapter_digest="", num_layers=4, exit_layer=4, exit_depth=4,
    exit_vocab=0, vocab_size=1000, max_model_len=64, dtype="float32", eos_token_ids=(2,),
    weights_digest="w", num_blocks=8, block_size=16,
)  # fmt: skip
PROMPT = (5, 6, 7)


class Letters:
    """Token 97 is "a" and so on."""

    def push(self, token_id: int) -> str:
        return chr(token_id)

    def flush(self) -> str:
        return ""


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(costs_of(EngineConfig(dtype="float32"), MODEL))


def completion(ledger: Ledger, resumed: tuple[Resumed, ...] = (), **params: Any) -> Completion:
    request = Request(
        request_id="r",
        prompt_token_ids=PROMPT,
        sampling=SamplingParams(**{"max_tokens": 10, **params}),
        compute=ComputePolicy(mode="full"),  # type: ignore[arg-type]
        resumed=resumed,
    )
    return Completion(request, 0, INFO, ledger, Letters)


def news(text: str, *, ids: tuple[int, ...] = (), **more: Any) -> SimpleNamespace:
    """An output of vLLM with news alone."""
    cached, reason = more.pop("cached", 0), more.pop("finish_reason", None)
    piece = SimpleNamespace(
        token_ids=[*map(ord, text), *ids], logprobs=None, finish_reason=reason, stop_reason=None
    )
    return SimpleNamespace(
        outputs=[piece], num_cached_tokens=cached, prompt_logprobs=more.pop("prompt_logprobs", None)
    )


def take(done: Completion, *outputs: SimpleNamespace) -> list[RequestOutput]:
    return [found for each in outputs if (found := done.take(each)) is not None]


def test_it_ends_at_its_length_with_its_usage(ledger: Ledger) -> None:
    done = completion(ledger, max_tokens=3)
    first, last = take(done, news("a"), news("bc", finish_reason="length"))
    assert (first.text, first.finish_reason, first.usage) == ("a", None, None)
    assert (last.text, last.finish_reason) == ("bc", FinishReason.LENGTH)
    assert [token.depth for token in first.tokens + last.tokens] == [4, 4, 4]
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 3)
    page = last.usage.compute
    # Rows: two of the prompt, and three that choose a token.
    assert page.prefill_layer_tokens == 2 * 4
    assert page.layers_per_token == page.mean_depth == 4
    assert (page.mode, page.decided, page.exited, page.lm_head_rows) == ("full", 3, 0, 3)
    assert page.kv_bytes_written == 5 * 4 * ledger.costs.kv_bytes
    assert page.realised_budget == 1
    assert ledger.total.flops == page.flops > 0


def test_cached_rows_are_not_run(ledger: Ledger) -> None:
    (last,) = take(completion(ledger, max_tokens=1), news("a", cached=2))
    assert last.usage is not None
    assert last.usage.cached_tokens == 2
    assert last.usage.compute.prefill_layer_tokens == 0


def test_a_stop_string_ends_it_and_is_no_part_of_the_text(ledger: Ledger) -> None:
    done = completion(ledger, stop=("cd",))
    found = take(done, news("a"), news("b"), news("c"), news("defg"))
    assert "".join(each.text for each in found) == "ab"
    assert found[-1].finish_reason is FinishReason.STOP
    assert found[-1].stop_reason == "cd"
    assert found[-1].usage is not None
    assert found[-1].usage.completion_tokens == 4  # what vLLM made beyond it is dropped
    assert done.over


@pytest.mark.parametrize(("ids", "reason"), [((2,), None), ((9,), 9)])
def test_tokens_that_end_it_are_told_apart(
    ledger: Ledger, ids: tuple[int, ...], reason: int | None
) -> None:
    done = completion(ledger, stop_token_ids=(9,))
    (found,) = take(done, news("a", ids=ids, finish_reason="stop"))
    assert (found.text, found.finish_reason, found.stop_reason) == ("a", FinishReason.STOP, reason)
    assert len(found.tokens) == 2


def test_scoring_alone_drops_the_token_that_vllm_must_make(ledger: Ledger) -> None:
    scores = [
        None,
        {6: SimpleNamespace(logprob=-1.0, rank=1)},
        {7: SimpleNamespace(logprob=-2.0, rank=3)},
    ]
    done = completion(ledger, max_tokens=0, prompt_logprobs=0)
    (found,) = take(done, news("a", prompt_logprobs=scores, finish_reason="length"))
    assert (found.tokens, found.text, found.finish_reason) == ([], "", FinishReason.LENGTH)
    assert found.prompt_tokens is not None
    assert [(token.id, token.logprob) for token in found.prompt_tokens] == [
        (5, None), (6, -1.0), (7, -2.0),
    ]  # fmt: skip


def test_it_goes_on_after_a_loss_from_what_was_shown(ledger: Ledger) -> None:
    given = Resumed(tuple(map(ord, "abc")), (4, 4, 4))
    done = completion(ledger, (given,), max_tokens=5, stop=("cd",))
    assert done.prompt == (*PROMPT, *given.token_ids)
    (found,) = take(done, news("d"))  # the stop string began before the loss
    assert (found.text, found.finish_reason) == ("", FinishReason.STOP)
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (3, 4)
    assert (found.usage.compute.decided, found.usage.compute.resumptions) == (4, 1)
    assert ledger.total.decided == 1
    ended = completion(ledger, (given,), max_tokens=3)
    assert ended.finish_reason is FinishReason.LENGTH  # only the news of its end was lost


def test_an_end_that_vllm_alone_sees_is_an_error(ledger: Ledger) -> None:
    (found,) = take(completion(ledger), news("a", finish_reason="abort"))
    assert (found.finish_reason, found.error) == (FinishReason.ERROR, "vLLM ended it: abort")


def test_figures_are_of_what_lives(ledger: Ledger) -> None:
    figures = Figures()
    scheduler = SimpleNamespace(
        num_waiting_reqs=2, num_skipped_waiting_reqs=1, kv_cache_usage=0.5,
        prefix_cache_stats=SimpleNamespace(queries=30, hits=10),
    )  # fmt: skip
    for _ in range(2):
        figures.record(scheduler, SimpleNamespace(num_preempted_reqs=1))
    figures.record(None, None)
    found = figures.stats(ledger, live=5)
    assert (found["num_requests_running"], found["num_requests_waiting"]) == (2, 3)
    assert (found["prefix_cache_queries"], found["prefix_cache_hits"]) == (60, 20)
    assert (found["num_preemptions"], found["kv_cache_usage_perc"]) == (2, 0.5)
    idle = figures.stats(ledger, live=0)
    assert idle["num_requests_running"] == idle["num_requests_waiting"] == 0
    assert idle["kv_cache_usage_perc"] == 0
