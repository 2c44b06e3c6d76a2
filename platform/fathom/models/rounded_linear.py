"""Linear layers of 4 or 8 bits in torch alone: for GPUs, and for CPUs without our kernels.

The weight is rounded as everywhere else (``quantized.py``) and kept in few bits; each call brings
it back to the dtype of its input. Activations are not rounded. It saves memory, not time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.models.linear import rms_norm
from fathom.models.quantized import GROUP, round_weight


class RoundedLinear:
    """``x @ weight.T + bias`` with a weight of 4 or 8 bits, on any device.

    Args:
        weight: [out, in] of any floating type. bias: [out] or None.
        bits: 4 or 8.

    Raises:
        ModelError: for a weight that cannot be rounded, see ``round_weight``.
    """

    packed = False

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, bits: int) -> None:
        self.out_features, self.in_features = weight.shape
        self._bias = bias
        rounded = round_weight(weight, bits)
        self._bits = bits
        self._scales, self._minima = rounded.scales, rounded.minima
        codes = rounded.codes.flatten(1)
        # Inputs j and j + 1 of a weight share a byte.
        self._codes = codes if bits == 8 else codes[:, 0::2] | (codes[:, 1::2] << 4)

    @property
    def num_weights(self) -> int:
        """Parameters, the bias among them."""
        return self.out_features * (self.in_features + (self._bias is not None))

    @property
    def nbytes(self) -> int:
        """Bytes that the weights and their scales take."""
        return self._codes.nbytes + self._scales.nbytes + self._minima.nbytes

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The weight as rounded: [out, in], computed in float32."""
        codes = self._codes
        if self._bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1)
        codes = codes.view(self.out_features, -1, GROUP)
        scales, minima = self._scales.float()[..., None], self._minima.float()[..., None]
        return torch.addcmul(minima, codes.float(), scales).flatten(1).to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to [rows, in]; returns [rows, out] in the same dtype."""
        bias = None if self._bias is None else self._bias.to(x.dtype)
        return F.linear(x, self.weight(x.dtype), bias)

    def normed(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """See ``AnyLinear``; ``norm`` is float32."""
        return self(rms_norm(x, norm.to(x.dtype), eps))

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        """See ``AnyLinear``."""
        return self(x).add_(residual)

    def normed_gated(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """See ``AnyLinear``."""
        gate, up = self.normed(x, norm, eps).chunk(2, -1)
        return F.silu(gate).mul_(up)
