"""Batching, blocks and ends: what the scheduler does must never show in the tokens."""

from __future__ import annotations

import random
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from fathom.engine.engine import Engine
from fathom.types import (
    AcceptMode,
    ComputePolicy,
    FinishReason,
    InvalidRequest,
    PolicyName,
    Request,
)
from tests.unit.engine.conftest import drain, request, run, run_one

FULL = ComputePolicy(mode=AcceptMode.FULL)
EXACT = ComputePolicy(mode=AcceptMode.EXACT, exit_threshold=0.1)
LONG = list(range(3, 39)) * 3


@pytest.fixture(scope="module")
def engine(make_engine) -> Engine:
    return make_engine()


def random_requests(count: int, seed: int) -> list[Request]:
    rng = random.Random(seed)
    requests = []
    for i in range(count):
        compute = ComputePolicy(
            mode=rng.choice(list(AcceptMode)),
            policy=rng.choice([PolicyName.THRESHOLD, PolicyName.FORCED, PolicyName.ALWAYS]),
            exit_threshold=rng.random() * 0.6,
            forced_exit_rate=rng.random(),
            max_stack=rng.randint(1, 9),
        )
        start = rng.randint(3, 6)  # few beginnings, so that prefixes are shared
        prompt = [start] * rng.randint(1, 20) + rng.choices(range(3, 40), k=rng.randint(0, 40))
        requests.append(
            request(
                f"r{i}",
                prompt,
                compute,
                n=rng.choice([1, 1, 1, 3]),
                max_tokens=rng.randint(1, 40),
                ignore_eos=rng.random() < 0.5,
                stop_token_ids=tuple(rng.sample(range(3, 40), rng.randint(0, 2))),
                seed=i,
            )
        )
    return requests


@pytest.mark.parametrize("num_blocks", [40, 400])
def test_random_requests_return_every_block_and_no_output_depends_on_the_batch(
    make_engine, num_blocks
):
    """Mixed lengths, modes, stops and cancellations; with few blocks, sequences are preempted."""
    engine = make_engine(num_blocks=num_blocks, max_num_batched_tokens=48, max_num_seqs=12)
    requests = random_requests(100, seed=num_blocks)
    rng = random.Random(7)
    cancelled = {item.request_id for item in rng.sample(requests, 20)}
    pending, outputs, ends = list(requests), {}, {}
    while pending or engine.has_work():
        for _ in range(rng.randint(0, 4)):
            if pending:
                engine.add_request(pending.pop(0))
        for output in engine.step():
            key = output.request_id, output.index
            outputs.setdefault(key, []).extend((t.id, t.depth) for t in output.tokens)
            ends[key] = output.finish_reason or ends.get(key)
            if output.request_id in cancelled and rng.random() < 0.3:
                engine.cancel(output.request_id)
    engine.check_integrity()
    assert engine.stats()["kv_cache_usage_perc"] == 0
    assert (engine.stats()["num_preemptions"] > 0) == (num_blocks == 40)
    assert engine.stats()["prefix_cache_hits"] > 0
    assert FinishReason.CANCELLED in ends.values()

    alone = make_engine(num_blocks=400, max_num_seqs=4)
    for item in requests:
        for (name, index), completion in run(alone, [item]).items():
            expected = list(zip(completion.ids, completion.depths, strict=True))
            found = outputs.get((name, index), [])
            if ends[name, index] is FinishReason.CANCELLED:
                assert found == expected[: len(found)]
            else:
                assert found == expected, (name, index)
                assert ends[name, index] is completion.last.finish_reason


def test_prompts_longer_than_a_pass_are_prefilled_in_chunks(make_engine, engine):
    chunked = make_engine(max_num_batched_tokens=10)
    for compute in (FULL, EXACT, ComputePolicy(mode=AcceptMode.FREE, exit_threshold=0.2)):
        expected = run_one(engine, request("a", LONG, compute))
        found = run(chunked, [request("a", LONG, compute), request("b", LONG[:50], FULL)])
        assert found["a", 0].ids == expected.ids


def test_a_shared_prefix_is_computed_once(make_engine):
    engine = make_engine()
    first = run_one(engine, request("a", LONG, EXACT))
    again = run_one(engine, request("b", LONG, EXACT))
    assert again.ids == first.ids
    usage = again.last.usage
    assert usage.cached_tokens >= len(LONG) - 8
    assert usage.compute.prefill_layer_tokens < first.last.usage.compute.prefill_layer_tokens / 5


def test_free_fills_the_cache_with_exact_deep_kv(make_engine):
    """Deep KV does not depend on the policy, so a `full` request may build on a `free` one."""
    engine = make_engine()
    free = ComputePolicy(mode=AcceptMode.FREE, exit_threshold=0.1)
    done = run_one(engine, request("a", LONG, free, max_tokens=40))
    conversation = LONG + done.ids + [5]
    reused = run_one(engine, request("b", conversation, FULL))
    assert reused.last.usage.cached_tokens > len(LONG)
    fresh = run_one(make_engine(), request("c", conversation, FULL))
    assert reused.ids == fresh.ids


def test_salts_keep_prefixes_apart(make_engine):
    engine = make_engine()
    for salt in ("tenant-1", "tenant-2"):
        item = Request(request_id=salt, prompt_token_ids=tuple(LONG), cache_salt=salt)
        assert run_one(engine, item).last.usage.cached_tokens == 0


@pytest.mark.parametrize("compute", [FULL, EXACT])
def test_n_completions_share_the_prompt_and_match_separate_seeds(engine, compute):
    knobs = {"temperature": 1.0, "max_tokens": 12}
    together = run(engine, [request("a", LONG, compute, n=4, seed=10, **knobs)])
    for index in range(4):
        single = run_one(engine, request("b", LONG, compute, seed=10 + index, **knobs))
        assert together["a", index].ids == single.ids
    assert len({tuple(c.ids) for c in together.values()}) > 1
    prompt_work = together["a", 3].last.usage.compute.prefill_layer_tokens
    assert prompt_work == 0


def test_cancelling_at_any_moment_gives_the_blocks_back(engine):
    for steps in range(6):
        engine.add_request(request("a", LONG, EXACT, n=2))
        for _ in range(steps):
            engine.step()
        assert engine.cancel("a")
        done = drain(engine)
        assert {c.last.finish_reason for c in done.values()} == {FinishReason.CANCELLED}
    assert not engine.cancel("a")


def test_a_deadline_ends_a_request_and_says_so(engine):
    engine.add_request(request("late", LONG, FULL, timeout_s=0.0, max_tokens=200))
    engine.add_request(request("fine", LONG, FULL, timeout_s=60.0))
    time.sleep(0.01)
    done = drain(engine)
    assert done["late", 0].last.finish_reason is FinishReason.DEADLINE
    assert "0.0 s" in done["late", 0].last.error
    assert done["fine", 0].last.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("mode", list(AcceptMode))
def test_non_finite_logits_end_that_request_only(make_engine, decoder, mode):
    engine = make_engine(num_blocks=60)
    compute = ComputePolicy(mode=mode, policy=PolicyName.ALWAYS)
    poison = 39
    saved = decoder.embedding[poison].clone()
    never = {poison: -100.0}  # the good ones must not come upon it themselves
    good = [request(f"good{i}", [5, 6, 7 + i], compute, logit_bias=never) for i in range(3)]
    expected = run(engine, good)
    try:
        decoder.embedding[poison] = torch.nan
        done = run(engine, [*good, request("bad", [5, 6, poison, 7], compute)])
        # Its blocks serve again, padded and masked, without a trace of what they held.
        after = run(engine, good)
    finally:
        decoder.embedding[poison] = saved
    assert done["bad", 0].last.finish_reason is FinishReason.ERROR
    assert "not finite" in done["bad", 0].last.error
    for results in (done, after):
        for item in good:
            assert results[item.request_id, 0].ids == expected[item.request_id, 0].ids


class ThreadedDeepStage:
    """The deep stage on another thread: its answers come later, as a remote one's do."""

    def __init__(self, deep, delay_s: float = 0.0, fail: bool = False) -> None:
        self._deep, self._delay_s, self.fail = deep, delay_s, fail
        self.may_be_lost = deep.may_be_lost
        self._pool = ThreadPoolExecutor(1)

    @property
    def cache(self):
        return self._deep.cache

    def flush(self, items) -> Future:
        def work():
            time.sleep(self._delay_s)
            if self.fail:
                raise ConnectionError("peer went away")
            return self._deep.flush(items).result()

        return self._pool.submit(work)

    def reopen(self) -> None:
        self._deep.reopen()

    def close(self) -> None:
        self._pool.shutdown()


def test_a_deep_stage_that_answers_later_changes_no_token(make_engine, engine):
    remote = make_engine(wrap_deep=lambda deep: ThreadedDeepStage(deep, delay_s=0.002))
    requests = random_requests(30, seed=3)
    found = run(remote, requests)
    remote.close()
    for item in requests:
        for key, completion in run(engine, [item]).items():
            assert found[key].ids == completion.ids
            assert found[key].depths == completion.depths


def test_a_flush_that_fails_ends_its_requests_and_the_engine_goes_on(make_engine):
    stages = []

    def wrap(deep):
        stages.append(ThreadedDeepStage(deep, fail=True))
        return stages[0]

    engine = make_engine(wrap_deep=wrap)
    done = run(engine, [request("a", LONG, FULL), request("b", [5], EXACT)])
    assert {c.last.finish_reason for c in done.values()} == {FinishReason.ERROR}
    assert "peer went away" in done["a", 0].last.error
    stages[0].fail = False
    assert len(run_one(engine, request("c", LONG, FULL)).ids) == 24
    engine.close()


def test_sampling_depends_on_the_seed_and_not_on_the_batch(engine):
    compute = ComputePolicy(mode=AcceptMode.EXACT, policy=PolicyName.FORCED, forced_exit_rate=0.6)
    item = request("a", LONG, compute, temperature=1.0, top_p=0.9, seed=3)
    alone = run_one(engine, item)
    crowd = run(engine, [*random_requests(10, seed=1), item])
    assert crowd["a", 0].ids == alone.ids
    other = run_one(engine, request("b", LONG, compute, temperature=1.0, top_p=0.9, seed=4))
    assert other.ids != alone.ids


def test_logprobs_are_the_full_models_where_the_mode_is_lossless(engine):
    knobs = {"logprobs": 3, "max_tokens": 8}
    collected = []
    for compute in (FULL, ComputePolicy(policy=PolicyName.ALWAYS)):
        engine.add_request(request("a", LONG, compute, **knobs))
        tokens = []
        while engine.has_work():
            tokens += [token for output in engine.step() for token in output.tokens]
        collected.append(tokens)
    for full, exact in zip(*collected, strict=True):
        assert full.id == exact.id == next(iter(full.top_logprobs))
        assert full.logprob == pytest.approx(exact.logprob, abs=1e-4)
        assert len(full.top_logprobs) == 3
        assert full.logprob == pytest.approx(full.top_logprobs[full.id])


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [40]}, "prompt"),
        ({"prompt": [5] * 512}, "prompt"),
        ({"n": 0}, "n"),
        ({"stop_token_ids": (99,)}, "stop_token_ids"),
        ({"stop": ("x",)}, "stop"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"compute": ComputePolicy(exit_threshold=1.5)}, "exit_threshold"),
        ({"compute": ComputePolicy(max_stack=0)}, "max_stack"),
    ],
)
def test_bad_requests_are_refused_by_name_and_leave_nothing_behind(engine, changes, param):
    fields = {"prompt": [5, 6], **changes}
    with pytest.raises(InvalidRequest) as caught:
        engine.add_request(request("a", **fields))
    assert caught.value.param == param
    assert not engine.has_work()


def test_a_live_request_id_is_refused(engine):
    engine.add_request(request("a", [5]))
    with pytest.raises(InvalidRequest, match="in use"):
        engine.add_request(request("a", [5]))
    drain(engine)


def test_the_ledger_adds_up(make_engine):
    engine = make_engine(prefix_caching=False)
    done = run(engine, random_requests(20, seed=5))
    total = engine.ledger.snapshot()
    pages = [c.last.usage.compute for c in done.values()]
    for name in (
        "shallow_layer_tokens",
        "deep_layer_tokens",
        "prefill_layer_tokens",
        "exit_head_rows",
        "lm_head_rows",
        "flush_rows",
        "drafted",
        "verified",
        "accepted",
        "exited",
        "decided",
        "depth_sum",
        "flops",
        "kv_bytes_written",
        "kv_bytes_read",
    ):
        assert getattr(total, name) == sum(getattr(page, name) for page in pages), name
    assert total.decided == sum(len(c.ids) for c in done.values())
    assert total.depth_sum == sum(sum(c.depths) for c in done.values())
    assert total.flushes <= sum(page.flushes for page in pages)
