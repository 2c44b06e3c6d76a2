"""Bytes that a decode step touches, beside those of a copy."""

from __future__ import annotations

import pytest

from fathom.bench.roofline import copy_bandwidth, fill_in, step_bytes, weight_bytes
from fathom.ledger import ModelCosts
from fathom.models.bits import Bits

COSTS = ModelCosts(
    layer_params=1000,
    qkv_params=300,
    attention_width=8,
    kv_bytes=32,
    exit_layer=2,
    num_layers=6,
    exit_layers=1,
    exit_head_params=50,
    lm_head_params=4000,
)


def test_a_full_pass_reads_all_layers_and_the_lm_head() -> None:
    assert weight_bytes(COSTS, Bits(), 2) == 2 * (6 * 1000 + 4000)
    assert weight_bytes(COSTS, Bits(), 4) == 2 * weight_bytes(COSTS, Bits(), 2)


def test_rounded_weights_are_read_with_their_scales() -> None:
    # 4 bits and 2 * 16 / 32 of scale and minimum; the head has 8 bits.
    assert weight_bytes(COSTS, Bits(4, 4), 2) == pytest.approx(6000 * 5 / 8 + 4000 * 9 / 8)
    assert weight_bytes(COSTS, Bits(8, 0), 2) == pytest.approx(2000 * 9 / 8 + 2 * 8000)


def test_every_sequence_reads_its_own_keys_and_values() -> None:
    alone = step_bytes(COSTS, Bits(), 2, sequences=1, context=100)
    assert alone == weight_bytes(COSTS, Bits(), 2) + 100 * 6 * 32
    three = step_bytes(COSTS, Bits(), 2, sequences=3, context=100)
    assert three - alone == 2 * 100 * 6 * 32


def test_rows_of_full_get_their_share_of_a_copy() -> None:
    rows = [
        {"engine": engine, "mode": mode, "batch": 1, "tpot_ms_p50": tpot, "over_copy": None}
        for engine, mode, tpot in (
            ("fathom", "full", 10.0),
            ("fathom", "exact", 10.0),
            ("fathom", "full", None),
            ("transformers", "full", 10.0),
        )
    ]
    fill_in(rows, COSTS, Bits(), 2, context=0, copied=4e6)
    assert rows[0]["bytes_per_s"] == pytest.approx(20_000 / 0.01)
    assert rows[0]["over_copy"] == pytest.approx(0.5)
    assert [row["over_copy"] for row in rows[1:]] == [None] * 3


def test_a_copy_takes_time_in_proportion() -> None:
    found = copy_bandwidth(repeats=1)
    assert 1e8 < found < 1e13  # a machine of this century
