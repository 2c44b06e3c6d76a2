"""Layers of the shallow path alone: they draft, and nothing else changes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.engine.engine import Engine
from fathom.exits.confidence import softmax_gap
from fathom.models.adapters import Adapter
from fathom.models.decoder import Decoder
from fathom.models.heads import build_exit_head
from fathom.models.load import load_exit_layers
from fathom.types import AcceptMode, ComputePolicy, PolicyName
from tests.unit.engine.conftest import EXIT_LAYER, NUM_LAYERS, request, run, run_one
from tests.unit.reference_attention import ContiguousAttention

FULL = ComputePolicy(mode=AcceptMode.FULL)
prompts = st.lists(st.integers(3, 39), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def engine(make_engine, exit_adapter: Adapter) -> Engine:
    return make_engine(trained=exit_adapter)


class Reference:
    """The shallow path of one sequence, over contiguous caches, a token at a time."""

    def __init__(self, decoder: Decoder, adapter: Adapter, directory) -> None:
        self.decoder = decoder
        self.extra = load_exit_layers(decoder, adapter)
        self.head = build_exit_head(decoder, directory, adapter, 0)

    def draft(self, tokens: list[int]) -> tuple[int, float]:
        """The draft after these tokens, and its confidence."""
        config = self.decoder.config
        attend = ContiguousAttention(config.num_heads, config.num_kv_heads)
        positions = list(range(len(tokens)))
        attend.set_rows([0] * len(tokens), positions)
        at = torch.tensor(positions)
        hidden = self.decoder.run(
            self.decoder.embed(torch.tensor(tokens)), at, 0, EXIT_LAYER, attend
        )
        hidden = self.extra.run(hidden, at, EXIT_LAYER, EXIT_LAYER + 1, attend)
        gap, column = softmax_gap(self.head.logits(hidden[-1:]))
        return self.head.token_of(int(column)), float(gap)


def test_drafts_are_those_of_the_exit_layers(engine, decoder, exit_adapter, model_dir):
    """In ``free``, with every token let go but at the cap: the shallow path writes the text."""
    reference = Reference(decoder, exit_adapter, model_dir)
    always = ComputePolicy(mode=AcceptMode.FREE, policy=PolicyName.ALWAYS, max_stack=4)
    prompt = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    done = run_one(engine, request("a", prompt, always, max_tokens=12))
    tokens = list(prompt)
    exits = 0
    for token, depth in zip(done.ids, done.depths, strict=True):
        if depth == EXIT_LAYER + 1:
            assert token == reference.draft(tokens)[0]
            exits += 1
        else:
            assert depth == NUM_LAYERS
        tokens.append(token)
    assert exits >= 8


@settings(max_examples=20, deadline=None)
@given(
    items=st.lists(
        st.tuples(prompts, st.floats(0, 0.9), st.integers(1, 9), st.integers(1, 30)),
        min_size=1,
        max_size=5,
    ),
    others=st.lists(prompts, max_size=3),
)
def test_exact_is_full_beside_requests_that_never_draft(engine, items, others):
    batch = [
        request(
            f"exact{i}",
            prompt,
            ComputePolicy(exit_threshold=threshold, max_stack=cap),
            max_tokens=length,
        )
        for i, (prompt, threshold, cap, length) in enumerate(items)
    ]
    batch += [request(f"full{i}", prompt, FULL) for i, prompt in enumerate(others)]
    done = run(engine, batch)
    for i, (prompt, _, _, length) in enumerate(items):
        alone = run_one(engine, request("full", prompt, FULL, max_tokens=length))
        assert done[f"exact{i}", 0].ids == alone.ids


def test_a_prefix_computed_without_exit_layers_is_not_used_to_draft(make_engine, exit_adapter):
    """Blocks of a ``full`` request hold no keys of the exit layers."""
    shared = list(range(3, 35))
    free = ComputePolicy(mode=AcceptMode.FREE, exit_threshold=0.1)
    fresh = make_engine(trained=exit_adapter)
    expected = run_one(fresh, request("a", [*shared, 7], free)).ids
    engine = make_engine(trained=exit_adapter)
    run_one(engine, request("warm", [*shared, 9], FULL))
    after_full = run_one(engine, request("b", [*shared, 7], free))
    assert after_full.ids == expected
    assert after_full.last.usage.cached_tokens == 0
    after_free = run_one(engine, request("c", [*shared, 7], free))
    assert after_free.ids == expected
    assert after_free.last.usage.cached_tokens == 32


def test_the_ledger_counts_exit_layers_where_they_run(engine):
    never_drafts = run_one(engine, request("a", [5, 6, 7], FULL, max_tokens=8))
    assert never_drafts.last.usage.compute.layers_per_token == NUM_LAYERS
    drafts = ComputePolicy(mode=AcceptMode.FREE, exit_threshold=1.0)  # drafts, never exits
    compute = run_one(engine, request("b", [5, 6, 7], drafts, max_tokens=8)).last.usage.compute
    assert compute.shallow_layer_tokens == 8 * (EXIT_LAYER + 1)
    assert compute.deep_layer_tokens == 8 * (NUM_LAYERS - EXIT_LAYER)


def test_drafts_take_no_blocks_of_requests_that_do_not_draft(make_engine, exit_adapter):
    """Not even where the adapter changes the full path too: such blocks lack the exit layers."""
    a, b = torch.zeros(1, 32), torch.zeros(32, 1)
    both = dataclasses.replace(
        exit_adapter, lora={"model.layers.0.self_attn.q_proj.weight": (a, b)}
    )
    assert both.changes_model
    prompt = list(range(3, 39))
    free = ComputePolicy(mode=AcceptMode.FREE, exit_threshold=0.05)
    alone = run_one(make_engine(trained=both), request("a", prompt, free))
    engine = make_engine(trained=both)
    run_one(engine, request("full", prompt, FULL))
    after = run_one(engine, request("a", prompt, free))
    assert (after.ids, after.depths) == (alone.ids, alone.depths)
    assert sum(depth < NUM_LAYERS for depth in after.depths) > 0
