"""A request that lost its replica goes on in another engine as if nothing had happened."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.config import EngineConfig
from fathom.engine.async_engine import AsyncEngine
from fathom.engine.build import assemble
from fathom.engine.deep import DeepLost, LocalDeepStage
from fathom.engine.engine import Engine
from fathom.models.decoder import Decoder
from fathom.models.heads import build_exit_head
from fathom.models.load import load_decoder
from fathom.models.tokenizer import load_backend
from fathom.types import (
    AcceptMode,
    ComputePolicy,
    FinishReason,
    InvalidRequest,
    PolicyName,
    Request,
    RequestOutput,
    Resumed,
)
from tests.tiny_models import save_random_llama, tiny_model
from tests.unit.engine.conftest import EXIT_LAYER, NUM_LAYERS, request

__all__ = ["tiny_model"]  # a fixture

END = 256  # the tokenizer's end token; the others are bytes


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, Decoder]:
    """A random model over bytes, most of them no whole characters, that disagrees with itself."""
    path = tmp_path_factory.mktemp("speaking")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, path)
    save_random_llama(path, vocab_size=257, eos_token_id=END, bos_token_id=None)
    return path, load_decoder(path, dtype=torch.float32)


@pytest.fixture(scope="module")
def fresh(speaking: tuple[Path, Decoder]) -> Callable[..., Engine]:
    """Builds an engine that has seen nothing yet."""
    directory, decoder = speaking

    def make(wrap_deep: Any = lambda deep: deep, **fields: Any) -> Engine:
        settings = {"block_size": 4, "kv_cache_bytes": 1 << 20, "pause_drafting": False, **fields}
        config = EngineConfig(model=str(directory), dtype="float32", **settings)
        return assemble(
            config,
            decoder,
            build_exit_head(decoder, directory, None, config.exit_vocab),
            exit_layer=EXIT_LAYER,
            weights_digest="speaking",
            backend=load_backend(directory),
            wrap_deep=wrap_deep,
        )

    return make


@pytest.fixture(scope="module")
def pairs(fresh: Callable[..., Engine]) -> Callable[..., tuple[Engine, Engine]]:
    """Engines to be lost and engines to go on in, kept: each measures itself when it is built."""
    return cache(lambda **fields: (fresh(**fields), fresh(**fields)))


@dataclasses.dataclass
class Seen:
    """What somebody has seen of one completion."""

    ids: list[int] = dataclasses.field(default_factory=list)
    depths: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    prompt: list[Any] | None = None
    end: RequestOutput | None = None

    def story(self) -> tuple[Any, ...]:
        """All of it that may not depend on where it was made."""
        assert self.end is not None and self.end.usage is not None
        usage = self.end.usage
        compute = usage.compute
        return (
            self.ids,
            self.depths,
            self.text,
            self.end.finish_reason,
            self.end.stop_reason,
            (usage.prompt_tokens, usage.completion_tokens),
            (compute.decided, compute.exited, compute.depth_sum),
        )


def see(outputs: Iterable[RequestOutput], n: int, seen: list[Seen] | None = None) -> list[Seen]:
    seen = [dataclasses.replace(s, ids=s.ids[:], depths=s.depths[:]) for s in seen or ()]
    seen = seen or [Seen() for _ in range(n)]
    for out in outputs:
        one = seen[out.index]
        assert one.end is None, "news after the end"
        one.ids += [token.id for token in out.tokens]
        one.depths += [token.depth for token in out.tokens]
        one.text += out.text
        if out.prompt_tokens is not None:
            assert one.prompt is None, "the prompt's scores came twice"
            one.prompt = out.prompt_tokens
        if out.finish_reason is not None:
            one.end = out
    return seen


def outputs_of(engine: Engine, item: Request) -> list[RequestOutput]:
    engine.add_request(item)
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    engine.check_integrity()
    assert engine.stats()["kv_cache_usage_perc"] == 0
    return outputs


def rest_of(item: Request, seen: list[Seen]) -> Request:
    return dataclasses.replace(
        item,
        request_id=f"{item.request_id} again",
        resumed=tuple(Resumed(tuple(s.ids), tuple(s.depths), s.end is not None) for s in seen),
    )


def check_every_cut(engines: tuple[Engine, Engine], item: Request) -> list[Seen]:
    lost, engine = engines
    outputs = outputs_of(lost, item)
    whole = see(outputs, item.n)
    for cut in range(len(outputs)):
        seen = see(outputs[:cut], item.n)
        again = see(outputs_of(engine, rest_of(item, seen)), item.n, seen)
        for before, after in zip(whole, again, strict=True):
            assert after.story() == before.story(), f"cut after {cut} of {len(outputs)} outputs"
            assert after.prompt == before.prompt or after.prompt is None
        assert again[0].prompt is None or item.sampling.prompt_logprobs is not None
        assert (again[0].prompt is None) == (whole[0].prompt is None)
        for before, after in zip(seen, again, strict=True):
            if before.end is None:
                assert after.end.usage.compute.resumptions == 1
                assert after.end.usage.compute.verified <= after.end.usage.compute.drafted
    return whole


# Policies whose λ follows what an engine has seen go on by what the next one has seen.
LIVE = (PolicyName.ADAPTIVE, PolicyName.BUDGET)
policies = st.builds(
    ComputePolicy,
    mode=st.sampled_from(list(AcceptMode)),
    policy=st.sampled_from([policy for policy in PolicyName if policy not in LIVE]),
    risk=st.just(0.05),
    exit_threshold=st.floats(0, 0.4),
    forced_exit_rate=st.floats(0.3, 1),
    max_stack=st.integers(1, 5),
    rollback_nats=st.floats(0, 4),
)
samplings = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(1, 20),
        "temperature": st.sampled_from([0.0, 0.0, 0.8, 1.5]),
        "top_p": st.sampled_from([1.0, 0.9]),
        "frequency_penalty": st.sampled_from([0.0, 0.7]),
        "repetition_penalty": st.sampled_from([1.0, 1.2]),
        "seed": st.integers(0, 2**40),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.sampled_from([(), tuple(range(0, 250, 16))]),
        "stop": st.sampled_from([(), ("e", "12", "\ufffd\ufffd\ufffd"), ("a", " ", "Z", "0")]),
        "logprobs": st.sampled_from([None, 2]),
        "prompt_logprobs": st.sampled_from([None, 1]),
    }
)


@settings(max_examples=20, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 255), min_size=1, max_size=20),
    compute=policies,
    sampling=samplings,
    n=st.sampled_from([1, 1, 3]),
    min_tokens=st.integers(0, 4),
    max_rows=st.sampled_from([8, 512]),
    prefix_caching=st.booleans(),
)
def test_wherever_it_is_cut_it_goes_on_as_if_it_were_not(
    pairs, prompt, compute, sampling, n, min_tokens, max_rows, prefix_caching
):
    """Tokens, depths, text, ends and counts, in every mode, greedy and drawn."""
    sampling["min_tokens"] = min(min_tokens, sampling["max_tokens"])
    check_every_cut(
        pairs(max_num_batched_tokens=max_rows, prefix_caching=prefix_caching),
        request("a", prompt, compute, n=n, **sampling),
    )


@pytest.mark.parametrize("mode", list(AcceptMode))
def test_a_long_answer_with_many_drafts(pairs, mode):
    """Long runs of drafts, longer than the stack; the cap falls where it would have fallen."""
    compute = ComputePolicy(mode=mode, policy=PolicyName.ALWAYS, max_stack=3, rollback_nats=3)
    (whole,) = check_every_cut(pairs(), request("a", b"Once upon a time", compute, max_tokens=40))
    if mode in (AcceptMode.FREE, AcceptMode.COPY):
        assert whole.depths.count(EXIT_LAYER) >= 20


def test_resumed_twice_and_preempted(fresh):
    compute = ComputePolicy(mode=AcceptMode.FREE, exit_threshold=0.1)
    items = [request(str(i), [i, 7, 8], compute, max_tokens=30, n=2, seed=i) for i in range(4)]
    for item in items:
        outputs = outputs_of(fresh(), item)
        whole = see(outputs, 2)
        seen = see(outputs[:9], 2)
        # Nine blocks of four positions: the two completions of 33 tokens do not fit side by side.
        small = fresh(kv_cache_bytes=16 * 4 * 4 * 2 * 2 * 8 * 4)
        more = outputs_of(small, rest_of(item, seen))
        again = see(more[:7], 2, seen)
        final = see(outputs_of(small, rest_of(item, again)), 2, again)
        assert [s.story() for s in final] == [s.story() for s in whole]


def test_drafts_from_before_are_in_no_trace_and_no_account(fresh):
    compute = ComputePolicy(mode=AcceptMode.FREE, policy=PolicyName.ALWAYS, max_stack=6)
    item = request("a", b"abc", compute, max_tokens=7)
    outputs = outputs_of(fresh(), item)
    engine = fresh()
    records = []
    engine.trace(records.append)
    (done,) = see(outputs_of(engine, rest_of(item, see(outputs[:4], 1))), 1)
    assert len(done.ids) == 3
    # Drafts 5 and 6, then the cap's decision, which no draft was made for.
    assert [record.position for record in records] == [6, 7]
    usage = done.end.usage.compute
    assert (usage.drafted, usage.verified) == (2, 2)
    assert (usage.decided, usage.exited) == (7, 6)
    assert engine.ledger.total.decided == 3


def test_a_loss_between_the_last_token_and_the_end(fresh):
    """The end comes at once and no token more, whichever completions are left."""
    engine = fresh()
    compute = ComputePolicy(mode=AcceptMode.FULL)
    item = request("a", b"abc", compute, max_tokens=5, n=3, seed=4)
    whole = see(outputs_of(engine, item), 3)
    full = tuple(whole[0].ids), tuple(whole[0].depths)
    third = tuple(whole[2].ids[:2]), tuple(whole[2].depths[:2])
    resumed = (Resumed(*full), Resumed(finished=True), Resumed(*third))
    outputs = outputs_of(engine, dataclasses.replace(item, request_id="b", resumed=resumed))
    assert [out.index for out in outputs if out.finish_reason] == [0, 2]
    assert all(out.index != 1 for out in outputs)
    assert outputs[0].finish_reason is FinishReason.LENGTH and not outputs[0].tokens
    assert outputs[0].usage.completion_tokens == 5
    assert [t.id for out in outputs if out.index == 2 for t in out.tokens] == whole[2].ids[2:]

    stop = dataclasses.replace(item.sampling, stop_token_ids=(whole[0].ids[1],))
    stopped = tuple(whole[0].ids[:2]), tuple(whole[0].depths[:2])
    (out,) = outputs_of(
        engine,
        dataclasses.replace(item, request_id="c", n=1, sampling=stop, resumed=(Resumed(*stopped),)),
    )
    assert out.finish_reason is FinishReason.STOP and out.stop_reason == whole[0].ids[1]


class MortalDeepStage:
    """A deep stage that is lost after some flushes, and for which there is no other."""

    may_be_lost = True

    def __init__(self, deep: LocalDeepStage, flushes: int) -> None:
        self._deep, self._left = deep, flushes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._deep, name)

    def flush(self, items: Any) -> Future[Any]:
        if self._left == 0:
            lost: Future[Any] = Future()
            lost.set_exception(DeepLost("killed"))
            return lost
        self._left -= 1
        return self._deep.flush(items)

    def reopen(self) -> None:
        raise DeepLost("there is no deep replica")


@pytest.mark.parametrize("mode", list(AcceptMode))
def test_without_a_deep_stage_a_request_can_go_on_elsewhere(fresh, pairs, mode):
    """The end that comes of it says so, and shows no text that was held back."""
    compute = ComputePolicy(mode=mode, exit_threshold=0.1)
    stop = ("ab", "\ufffd\ufffd\ufffd\ufffd")
    item = request("a", b"abc", compute, max_tokens=24, n=2, seed=3, stop=stop, temperature=1)
    healthy, other = pairs()
    whole = see(outputs_of(healthy, item), 2)
    for flushes in range(0, 12, 3):
        engine = fresh(wrap_deep=lambda deep, left=flushes: MortalDeepStage(deep, left))
        outputs = outputs_of(engine, item)
        lost = [out for out in outputs if out.retriable]
        assert lost or all(seen.end is not None for seen in see(outputs, 2))
        assert all("no deep stage is left" in out.error for out in lost)
        seen = see(outputs, 2)
        for one in seen:
            one.end = None if one.end.retriable else one.end
        if lost:
            seen = see(outputs_of(other, rest_of(item, seen)), 2, seen)
        assert [one.story() for one in seen] == [one.story() for one in whole]


def test_more_drafts_than_a_pass_takes_are_no_end(fresh):
    """No engine gives such a history, but one that is told of it must not hang."""
    compute = ComputePolicy(mode=AcceptMode.FREE, policy=PolicyName.ALWAYS, max_stack=3)
    item = request("a", b"abc", compute, max_tokens=24)
    history = Resumed((65,) * 20, (EXIT_LAYER,) * 20)
    engine = fresh(max_num_batched_tokens=8)
    (done,) = see(outputs_of(engine, dataclasses.replace(item, resumed=(history,))), 1)
    assert done.depths == [NUM_LAYERS, EXIT_LAYER, EXIT_LAYER, EXIT_LAYER]


def test_the_stream_ends_with_the_completions_that_are_left(fresh):
    async def main() -> list[RequestOutput]:
        engine = AsyncEngine(fresh())
        item = request("a", b"abc", max_tokens=4, n=3)
        item = dataclasses.replace(
            item, resumed=(Resumed(finished=True), Resumed(), Resumed(finished=True))
        )
        try:
            async with asyncio.timeout(20):
                return [out async for out in engine.generate(item)]
        finally:
            await engine.shutdown()

    outputs = asyncio.run(main())
    assert {out.index for out in outputs} == {1}
    assert [out.finish_reason for out in outputs if out.finish_reason] == [FinishReason.LENGTH]


@pytest.mark.parametrize(
    ("resumed", "message"),
    [
        ((Resumed(),), "one entry a completion"),
        ((Resumed(finished=True), Resumed(finished=True)), "nothing to go on with"),
        ((Resumed((1,), ()), Resumed()), "1 tokens and 0 depths"),
        ((Resumed((1,) * 9, (4,) * 9), Resumed()), "at most 8"),
        ((Resumed((257,), (4,)), Resumed()), "vocabulary of 257"),
        ((Resumed((1,), (NUM_LAYERS + 1,)), Resumed()), "depths must be from 1 to 4"),
        ((Resumed((END, 1), (4, 4)), Resumed()), "past a token that ends it"),
    ],
)
def test_what_cannot_be_resumed_is_refused(fresh, resumed, message):
    item = request("a", b"abc", n=2, max_tokens=8, ignore_eos=False)
    with pytest.raises(InvalidRequest, match=message) as caught:
        fresh().add_request(dataclasses.replace(item, resumed=resumed))
    assert caught.value.param == "resumed"
