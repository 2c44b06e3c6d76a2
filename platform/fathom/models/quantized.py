"""Weights of 4 or 8 bits: how they are rounded.

Each row of a weight is cut into groups of 32. A group's weights become ``d * q + m``, q an integer
in [0, 2^bits), d and m half precision: llama.cpp's Q4_1, so that a model out of such a file loses
nothing more here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fathom.models.errors import ModelError

GROUP = 32
"""Weights that share a scale and a minimum."""

HEAD_BITS = 8
"""Bits of LM head and exit heads in a quantized stage: they decide between tokens."""


class Rounded(NamedTuple):
    """A weight in few bits.

    Attributes:
        codes: uint8 [out, groups, 32]. scales, minima: float16 [out, groups].
    """

    codes: Tensor
    scales: Tensor
    minima: Tensor

    def floats(self) -> Tensor:
        """The weights as they are now: float32 [out, in]."""
        scales, minima = self.scales.float()[..., None], self.minima.float()[..., None]
        return (self.codes.float() * scales + minima).flatten(1)


def round_weight(weight: Tensor, bits: int) -> Rounded:
    """Round to the nearest of 2^bits steps between each group's least and largest weight.

    Args:
        weight: [out, in] of any floating type, in a multiple of 32.

    Raises:
        ModelError: for another width, or weights that half precision cannot scale.
    """
    out, inputs = weight.shape
    if inputs % GROUP:
        raise ModelError(
            f"quantization needs layers whose width is a multiple of {GROUP}, got {inputs}: leave "
            "it off for this model."
        )
    top = (1 << bits) - 1
    grouped = weight.float().view(out, -1, GROUP)
    minima = grouped.amin(-1).half()
    scales = ((grouped.amax(-1) - minima.float()) / top).half()
    if not (minima.isfinite().all() and scales.isfinite().all()):
        raise ModelError("quantization: a weight is not finite, or beyond 65504.")
    # Where all weights of a group are equal, or closer than half precision can tell, d is 0.
    steps = scales.float()[..., None].clamp_min(1e-12)
    codes = ((grouped - minima.float()[..., None]) / steps).round_().clamp_(0, top)
    return Rounded(codes.to(torch.uint8), scales, minima)
