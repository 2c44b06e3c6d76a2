"""What each accept mode promises, against transformers and against slow references."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from fathom.engine.engine import Engine
from fathom.exits.confidence import softmax_gap
from fathom.models.decoder import Decoder
from fathom.models.load import load_decoder
from fathom.types import AcceptMode, ComputePolicy, FinishReason, PolicyName
from tests.tiny_models import save_random_llama
from tests.unit.engine.conftest import (
    EXIT_LAYER,
    NUM_LAYERS,
    make_engine_of,
    request,
    run,
    run_one,
)
from tests.unit.reference_attention import ContiguousAttention

FULL = ComputePolicy(mode=AcceptMode.FULL)
PROMPTS = [[5, 6, 7], [9], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9], list(range(3, 35))]


@pytest.fixture(scope="module")
def engine(make_engine) -> Engine:
    return make_engine()


@pytest.fixture(scope="module")
def oracle(model_dir: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def transformers_greedy(
    model: transformers.PreTrainedModel, prompt: list[int], n: int
) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
    return out[0, len(prompt) :].tolist()


def test_full_depth_is_transformers_greedy_output(engine, oracle):
    done = run(
        engine,
        [request(str(i), p, FULL, max_tokens=64) for i, p in enumerate(PROMPTS)],
    )
    for i, prompt in enumerate(PROMPTS):
        assert done[str(i), 0].ids == transformers_greedy(oracle, prompt, 64)
        assert set(done[str(i), 0].depths) == {NUM_LAYERS}
        assert done[str(i), 0].last.usage.compute.layers_per_token == NUM_LAYERS


@pytest.mark.parametrize("mode", [mode for mode in AcceptMode if mode is not AcceptMode.FULL])
def test_never_exiting_is_full_depth(engine, mode):
    never = ComputePolicy(mode=mode, policy=PolicyName.NEVER)
    for prompt in PROMPTS:
        assert (
            run_one(engine, request("a", prompt, never)).ids
            == run_one(engine, request("b", prompt, FULL)).ids
        )


prompts = st.lists(st.integers(3, 39), min_size=1, max_size=40)
policies = st.builds(
    ComputePolicy,
    mode=st.just(AcceptMode.EXACT),
    policy=st.sampled_from(list(PolicyName)),
    exit_threshold=st.floats(0, 1),
    forced_exit_rate=st.floats(0, 1),
    max_stack=st.integers(1, 9),
    budget=st.floats(0.8, 1),
    risk=st.just(0.05),
    probe_rate=st.sampled_from([None, 0.3]),
)


@settings(max_examples=20, deadline=None)
@given(
    items=st.lists(st.tuples(prompts, policies, st.integers(1, 30)), min_size=1, max_size=6),
    others=st.lists(st.tuples(prompts, st.sampled_from(list(AcceptMode))), max_size=3),
)
def test_exact_is_full_token_for_token(engine, items, others):
    """At any threshold, stack cap and batch mix."""
    batch = [
        request(f"exact{i}", prompt, compute, max_tokens=length, ignore_eos=False)
        for i, (prompt, compute, length) in enumerate(items)
    ]
    batch += [
        request(f"other{i}", prompt, ComputePolicy(mode=mode, exit_threshold=0.2))
        for i, (prompt, mode) in enumerate(others)
    ]
    done = run(engine, batch)
    for i, (prompt, _, length) in enumerate(items):
        full = run_one(engine, request("full", prompt, FULL, max_tokens=length, ignore_eos=False))
        assert done[f"exact{i}", 0].ids == full.ids
        assert done[f"exact{i}", 0].last.finish_reason == full.last.finish_reason


@settings(max_examples=15, deadline=None)
@given(prompt=prompts, compute=policies, penalty=st.floats(-1, 1), bias=st.integers(3, 39))
def test_exact_is_full_under_penalties_and_bias(engine, prompt, compute, penalty, bias):
    knobs = {
        "frequency_penalty": penalty,
        "repetition_penalty": 1.3,
        "logit_bias": {bias: 4.0},
        "min_tokens": 5,
        "ignore_eos": False,
    }
    exact = run_one(engine, request("exact", prompt, compute, **knobs))
    full = run_one(engine, request("full", prompt, FULL, **knobs))
    assert exact.ids == full.ids


class PaperAlgorithm:
    """FREE's decoding, straight from free.md: one sequence, nothing batched, nothing paged."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        heads = decoder.config.num_heads, decoder.config.num_kv_heads
        self.shallow, self.deep = ContiguousAttention(*heads), ContiguousAttention(*heads)

    def layers(self, attend, hidden, positions, first, last) -> torch.Tensor:
        attend.set_rows([0] * len(positions), positions)
        return self.decoder.run(hidden, torch.tensor(positions), first, last, attend)

    def generate(self, prompt: list[int], threshold: float, cap: int, n: int):
        tokens, ids, depths = list(prompt), [], []
        stack = torch.empty(0, self.decoder.config.hidden_size)
        flushed = shallow_done = drafts = 0
        while len(ids) < n:
            rows = tokens[shallow_done:]
            positions = list(range(shallow_done, len(tokens)))
            hidden = self.layers(
                self.shallow, self.decoder.embed(torch.tensor(rows)), positions, 0, EXIT_LAYER
            )
            shallow_done = len(tokens)
            stack = torch.cat([stack, hidden])
            gap, best = softmax_gap(self.decoder.logits(hidden[-1:]))
            if float(gap) > threshold and drafts < cap:
                token, depth = int(best), EXIT_LAYER
                drafts += 1
            else:
                positions = list(range(flushed, len(tokens)))
                out = self.layers(self.deep, stack, positions, EXIT_LAYER, NUM_LAYERS)
                token, depth = int(self.decoder.logits(out[-1:]).argmax()), NUM_LAYERS
                stack, flushed, drafts = stack[:0], len(tokens), 0
            tokens.append(token)
            ids.append(token)
            depths.append(depth)
        return ids, depths


@settings(max_examples=15, deadline=None)
@given(
    items=st.lists(
        st.tuples(prompts, st.floats(0.0, 0.6), st.integers(1, 8)), min_size=1, max_size=5
    )
)
def test_free_emits_what_the_papers_algorithm_emits(engine, decoder, items):
    done = run(
        engine,
        [
            request(
                str(i),
                prompt,
                ComputePolicy(mode=AcceptMode.FREE, exit_threshold=threshold, max_stack=cap),
            )
            for i, (prompt, threshold, cap) in enumerate(items)
        ],
    )
    for i, (prompt, threshold, cap) in enumerate(items):
        ids, depths = PaperAlgorithm(decoder).generate(prompt, threshold, cap, 24)
        assert done[str(i), 0].ids == ids
        assert done[str(i), 0].depths == depths


def calm(decoder: Decoder, prompt: list[int], threshold: float, n: int):
    """CALM's state copying at one exit: a token at a time, every layer's own cache in turn."""
    attend = ContiguousAttention(decoder.config.num_heads, decoder.config.num_kv_heads)

    def layers(hidden, positions, first, last):
        attend.set_rows([0] * len(positions), positions)
        return decoder.run(hidden, torch.tensor(positions), first, last, attend)

    tokens, ids, depths = list(prompt), [], []
    hidden = decoder.embed(torch.tensor(prompt))
    out = layers(hidden, list(range(len(prompt))), 0, NUM_LAYERS)
    while True:
        tokens.append(int(decoder.logits(out[-1:]).argmax()))
        ids.append(tokens[-1])
        depths.append(NUM_LAYERS)
        while True:
            if len(ids) == n:
                return ids, depths
            at = [len(tokens) - 1]
            state = layers(decoder.embed(torch.tensor(tokens[-1:])), at, 0, EXIT_LAYER)
            gap, best = softmax_gap(decoder.logits(state))
            if float(gap) <= threshold:
                out = layers(state, at, EXIT_LAYER, NUM_LAYERS)
                break
            for layer in range(EXIT_LAYER, NUM_LAYERS):
                layers(state, at, layer, layer + 1)  # for its keys and values alone
            tokens.append(int(best))
            ids.append(tokens[-1])
            depths.append(EXIT_LAYER)


@settings(max_examples=25, deadline=None)
@given(
    items=st.lists(
        st.tuples(prompts, st.floats(0.0, 0.6), st.integers(1, 8)), min_size=1, max_size=5
    )
)
def test_copy_emits_what_calm_emits(engine, decoder, items):
    done = run(
        engine,
        [
            request(
                str(i),
                prompt,
                ComputePolicy(mode=AcceptMode.COPY, exit_threshold=threshold, max_stack=cap),
            )
            for i, (prompt, threshold, cap) in enumerate(items)
        ],
    )
    for i, (prompt, threshold, _) in enumerate(items):
        ids, depths = calm(decoder, prompt, threshold, 24)
        assert done[str(i), 0].ids == ids
        assert done[str(i), 0].depths == depths


def test_copied_states_are_nobody_elses(make_engine):
    """A later request must not find keys and values that no layer has computed."""
    engine = make_engine(prefix_caching=True)
    prompt = PROMPTS[3]
    always = ComputePolicy(mode=AcceptMode.COPY, policy=PolicyName.ALWAYS)
    copied = run_one(engine, request("a", prompt, always, max_tokens=40))
    assert copied.last.usage.compute.drafted == 39
    longer = prompt + copied.ids
    found = run_one(engine, request("b", longer, FULL))
    assert 0 < found.last.usage.cached_tokens <= len(prompt)
    assert found.ids == run_one(make_engine(), request("c", longer, FULL)).ids
    engine.check_integrity()


def test_a_free_first_token_leaves_before_the_deep_prefill(engine):
    engine.add_request(
        request("a", PROMPTS[3], ComputePolicy(mode=AcceptMode.FREE, policy=PolicyName.ALWAYS))
    )
    flushes = engine.stats()["flushes"]
    outputs = engine.step()
    assert [token.depth for token in outputs[0].tokens] == [EXIT_LAYER]
    assert engine.stats()["flushes"] == flushes
    while engine.has_work():
        engine.step()


def test_held_drafts_are_never_shown_before_a_flush(engine):
    for mode in (AcceptMode.EXACT, AcceptMode.ROLLBACK):
        engine.add_request(
            request("a", PROMPTS[0], ComputePolicy(mode=mode, policy=PolicyName.ALWAYS))
        )
        shown = engine.stats()["flushes"]
        while engine.has_work():
            outputs = engine.step()
            flushes = engine.stats()["flushes"]
            assert not outputs or flushes > shown
            shown = flushes if outputs else shown


@settings(max_examples=20, deadline=None)
@given(prompt=prompts, nats=st.floats(0, 3))
def test_rollback_keeps_drafts_within_tau_and_replaces_the_first_beyond(
    engine, decoder, prompt, nats
):
    compute = ComputePolicy(
        mode=AcceptMode.ROLLBACK, policy=PolicyName.ALWAYS, rollback_nats=nats, max_stack=4
    )
    done = run_one(engine, request("a", prompt, compute))
    tokens = prompt + done.ids
    attend = ContiguousAttention(decoder.config.num_heads, decoder.config.num_kv_heads)
    positions = list(range(len(tokens)))
    attend.set_rows([0] * len(tokens), positions)
    hidden = decoder.embed(torch.tensor(tokens))
    scores = torch.log_softmax(
        decoder.logits(decoder.run(hidden, torch.tensor(positions), 0, NUM_LAYERS, attend)), -1
    )
    for i, (token, depth) in enumerate(zip(done.ids, done.depths, strict=True)):
        row = scores[len(prompt) - 1 + i]
        if depth == EXIT_LAYER:
            assert -float(row[token]) <= nats + 1e-4
        else:
            assert token == int(row.argmax())


@pytest.mark.parametrize("exit_vocab", [0, 3])
def test_exact_sampling_follows_the_full_models_distribution(tmp_path, exit_vocab):
    """Chi-square over all 3-token continuations; with an exit head over part of the vocabulary."""
    vocab, length, samples = 5, 3, 4000
    directory = save_random_llama(tmp_path, vocab_size=vocab, initializer_range=0.4)
    decoder = load_decoder(directory, dtype=torch.float32)
    engine = make_engine_of(decoder, directory, 2000, max_num_seqs=128, exit_vocab=exit_vocab)
    compute = ComputePolicy(
        mode=AcceptMode.EXACT, policy=PolicyName.FORCED, forced_exit_rate=0.8, max_stack=2
    )
    prompt = [3, 1, 4]
    done = run(
        engine,
        [
            request(str(i), prompt, compute, max_tokens=length, temperature=0.7, seed=i)
            for i in range(samples)
        ],
    )
    exited = sum(EXIT_LAYER in completion.depths for completion in done.values())
    assert exited > samples / 10, "no drafts were accepted: the test shows nothing"

    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer = {}
        for prefix, mass in expected.items():
            with torch.no_grad():
                logits = model(torch.tensor([prompt + list(prefix)])).logits[0, -1].double()
            probs = torch.softmax(logits / 0.7, dim=-1).tolist()
            longer.update({(*prefix, t): mass * p for t, p in enumerate(probs)})
        expected = longer
    counts = Counter(tuple(completion.ids) for completion in done.values())
    cells = sorted(expected, key=lambda cell: -expected[cell])
    # Cells of less than 5 expected samples are pooled, as the test's approximation asks.
    large = [cell for cell in cells if expected[cell] * samples >= 5]
    observed = [counts[cell] for cell in large]
    predicted = [expected[cell] * samples for cell in large]
    observed.append(samples - sum(observed))
    predicted.append(samples - sum(predicted))
    p_value = chisquare(np.array(observed), np.array(predicted)).pvalue
    assert p_value > 1e-3, p_value


def test_a_drafted_end_is_flushed_and_in_exact_verified(engine):
    """EOS ends a sequence only if the full model says so; in `free` the draft is enough."""
    for prompt in PROMPTS:
        for mode in AcceptMode:
            done = run_one(
                engine,
                request(
                    "a",
                    prompt,
                    ComputePolicy(mode=mode, policy=PolicyName.ALWAYS),
                    ignore_eos=False,
                    max_tokens=60,
                ),
            )
            if done.last.finish_reason is FinishReason.STOP:
                assert done.ids[-1] == 2
            assert 2 not in done.ids[:-1]
            usage = done.last.usage.compute
            assert usage.verified <= usage.drafted
            if mode is AcceptMode.FREE:
                assert usage.verified == usage.drafted, "the last drafts were never flushed"
