"""Weights of 4 or 8 bits on a CPU: how they are rounded and laid out, and their products.

Each row of a weight is cut into groups of 32. A group's weights become ``d * q + m``, q an integer
in [0, 2^bits), d and m half precision: llama.cpp's Q4_1, so that a model out of such a file loses
nothing more here. Activations are rounded to 8 bits, a scale for every 32 of a row, as in
llama.cpp. ``fathom/kernels/low_bit.cpp`` says what is computed. A row's result does not depend on
the rows beside it, bit for bit.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.kernels.compiled import Weight, library
from fathom.models.errors import ModelError
from fathom.models.linear import AnyLinear, Linear

GROUP = 32
"""Weights that share a scale and a minimum."""

HEAD_BITS = 8
"""Bits of LM head and exit heads in a quantized stage: they decide between tokens."""

_COLUMNS = 32  # outputs of a block
_LANES = 16  # outputs of a half block
_PLAIN, _ADD, _SILU_MUL = 0, 1, 2


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


class QuantizedLinear:
    """``x @ weight.T + bias`` with a rounded weight, and what comes before and after it, in one go.

    Args:
        weight: [out, in] of any floating type on a CPU. bias: [out] or None.
        bits: 4 or 8.
        gated: the first half of the outputs are a gate's, see ``normed_gated``.

    Attributes:
        address: of the weight as the kernels take it.

    Raises:
        ModelError: for a shape that the kernels cannot take, or without a compiler.
    """

    packed = False

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, bits: int, gated: bool = False
    ) -> None:
        self.out_features, self.in_features = weight.shape
        self._has_bias = bias is not None
        if gated:
            if self.out_features % (2 * GROUP):
                raise ModelError(
                    f"quantization needs an inner width that is a multiple of {GROUP}, got "
                    f"{self.out_features // 2}: leave it off for this model."
                )
            weight, bias = _interleave(weight), None if bias is None else _interleave(bias)
        self._codes, self._scales = _pack(round_weight(weight, bits), bits)
        self._bias = None if bias is None else bias.float().contiguous()
        self._weight = Weight(
            self._codes.data_ptr(),
            self._scales.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            self.out_features,
            self.in_features,
            bits,
        )
        self.address = ctypes.addressof(self._weight)
        self._run = library().fathom_linear

    @property
    def num_weights(self) -> int:
        """Parameters, the bias among them."""
        return self.out_features * (self.in_features + self._has_bias)

    @property
    def nbytes(self) -> int:
        """Bytes that the weights and their scales take."""
        return self._codes.nbytes + self._scales.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to [rows, in], float32 or bfloat16; returns [rows, out] in the same dtype."""
        return self._apply(x, self.out_features)

    def normed(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """RMSNorm with ``norm`` (float32 [in]), then the linear."""
        return self._apply(x, self.out_features, norm, eps)

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        """The linear, then ``+ residual`` [rows, out]; ``residual`` stays as it is."""
        return self._apply(x, self.out_features, residual=residual)

    def normed_gated(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """RMSNorm and the linear; of its outputs, silu of the first half times the second."""
        return self._apply(x, self.out_features // 2, norm, eps, gated=True)

    def _apply(
        self,
        x: Tensor,
        columns: int,
        norm: Tensor | None = None,
        eps: float = 0.0,
        *,
        residual: Tensor | None = None,
        gated: bool = False,
    ) -> Tensor:
        if x.stride(1) != 1:
            x = x.contiguous()
        out = x.new_empty((len(x), columns))
        self._run(
            self.address,
            x.data_ptr(),
            x.dtype is torch.bfloat16,
            len(x),
            x.stride(0),
            None if norm is None else norm.data_ptr(),
            eps,
            _SILU_MUL if gated else (_PLAIN if residual is None else _ADD),
            None if residual is None else residual.data_ptr(),
            0 if residual is None else residual.stride(0),
            out.data_ptr(),
            columns,
            torch.get_num_threads(),
        )
        return out


def make_linear(
    weight: Tensor, bias: Tensor | None = None, *, bits: int = 0, gated: bool = False
) -> AnyLinear:
    """A linear layer with weights of so many bits, 0 for those of ``weight``.

    Args:
        weight: [out, in]. bias: [out] or None. gated: see ``QuantizedLinear``.
    """
    return QuantizedLinear(weight, bias, bits=bits, gated=gated) if bits else Linear(weight, bias)


def _interleave(parts: Tensor) -> Tensor:
    """16 outputs of the first half and 16 of the second in turns, as ``kSiluMul`` takes them."""
    shape = parts.shape
    return parts.view(2, -1, _LANES, *shape[1:]).transpose(0, 1).reshape(shape)


def _pack(rounded: Rounded, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales in the kernels' layout, outputs filled up to whole blocks."""
    out, groups = rounded.scales.shape
    padding = -out % _COLUMNS
    codes = F.pad(rounded.codes, (0, 0, 0, 0, 0, padding))
    # [blocks, 32 outputs, groups, 8 steps, 4 inputs] -> [blocks, groups, steps, outputs, inputs]
    codes = codes.view(-1, _COLUMNS, groups, GROUP // 4, 4).permute(0, 2, 3, 1, 4)
    if bits == 4:
        codes = codes[:, :, 0::2] | (codes[:, :, 1::2] << 4)
    both = torch.stack(
        [F.pad(each, (0, 0, 0, padding)) for each in (rounded.scales, rounded.minima)]
    )
    # [d and m, blocks, outputs, groups] -> [blocks, groups, d and m, outputs]
    both = both.view(2, -1, _COLUMNS, groups).permute(1, 3, 0, 2)
    return codes.contiguous(), both.contiguous()
