"""How near decoding comes to the speed of memory: bytes that it must touch over those of a copy.

At few sequences a decode step reads every weight once and does little with it, so memory bounds it
(Williams et al., "Roofline", 2009). The bound here is what a plain copy moves on the same device
with the same threads, bytes read and written both counted (STREAM's copy, McCalpin, 1995).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from fathom.ledger import ModelCosts
from fathom.models.bits import Bits
from fathom.models.quantized import GROUP, HEAD_BITS

_COPIED = 256 << 20
"""Bytes: more than any cache holds."""


def copy_bandwidth(device: str = "cpu", repeats: int = 7) -> float:
    """Bytes a second that ``torch.Tensor.copy_`` reads and writes together, the median copy."""
    source = torch.ones(_COPIED, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        target.copy_(source)
        if source.is_cuda:
            torch.cuda.synchronize(source.device)
        seconds.append(time.perf_counter() - begin)
    return 2 * _COPIED / statistics.median(seconds[1:])


def weight_bytes(costs: ModelCosts, bits: Bits, itemsize: int) -> float:
    """Bytes of all weights that one pass at full depth multiplies with.

    Args:
        itemsize: of a weight that is not quantized.
    """
    layers = sum(
        costs.layer_params * _bytes_of(width, itemsize)
        for width in bits.of_layers(costs.exit_layer, costs.num_layers)
    )
    head = HEAD_BITS if bits.deep else 0
    return layers + costs.lm_head_params * _bytes_of(head, itemsize)


def step_bytes(
    costs: ModelCosts, bits: Bits, itemsize: int, *, sequences: int, context: float
) -> float:
    """Bytes that a decode step at full depth must touch: weights once, everybody's keys and values.

    Args:
        context: mean positions that a sequence looks back at.
    """
    kv = costs.kv_bytes * costs.num_layers * context
    return weight_bytes(costs, bits, itemsize) + sequences * kv


def _bytes_of(bits: int, itemsize: int) -> float:
    """Of a weight: with the half-precision scale and minimum of its group, where it is rounded."""
    return itemsize if not bits else (bits + 2 * 16 / GROUP) / 8


def fill_in(
    rows: Sequence[dict[str, Any]],
    costs: ModelCosts,
    bits: Bits,
    itemsize: int,
    *,
    context: float,
    copied: float,
) -> None:
    """Fill in ``bytes_per_s`` and ``over_copy`` of our rows of mode ``full``.

    Other modes touch the weights of both stages at rates of their own, which no row tells.

    Args:
        context: see ``step_bytes``. copied: ``copy_bandwidth`` of the same run.
    """
    for row in rows:
        step_ms = row["tpot_ms_p50"]  # the sequences of a batch decode in step
        if row["engine"] == "fathom" and row["mode"] == "full" and step_ms:
            touched = step_bytes(costs, bits, itemsize, sequences=row["batch"], context=context)
            row["bytes_per_s"] = touched / (step_ms / 1e3)
            row["over_copy"] = row["bytes_per_s"] / copied
