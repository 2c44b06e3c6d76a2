"""A linear layer for inference, with its weight packed for the CPU's matrix kernels."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.kernels.compiled import optional_library

# The row count that oneDNN lays the weight out for. One layout serves every row count; these were
# the best or close to it at 1 to 64 rows on one thread (135M model, AVX-512): bfloat16 at 1 row
# 36 -> 18 ms a pass, at 8 rows 42 -> 21 ms; float32 at 8 rows 86 -> 38 ms.
_PACKING_ROWS = {torch.bfloat16: 1, torch.float32: 64}


# oneDNN's kernels for fewer rows are slower than the one for this many: all linears of a 135M
# model, one thread, 1 row alone or filled up to 4: float32 41 -> 35 ms, bfloat16 26 -> 24 ms.
# Rounding then depends less on how many rows a pass happens to have, too.
MIN_PACKED_ROWS = 4


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights of this dtype on this device can be packed for oneDNN."""
    if device.type != "cpu" or dtype not in _PACKING_ROWS:
        return False
    ops = torch.ops.mkldnn
    if not hasattr(ops, "_reorder_linear_weight") or not hasattr(ops, "_linear_pointwise"):
        return False
    # Without AVX-512, oneDNN may not compute in bfloat16.
    return dtype is torch.float32 or bool(ops._is_mkldnn_bf16_supported())


class AnyLinear(Protocol):
    """What a decoder asks of a linear layer; see ``Linear``."""

    @property
    def packed(self) -> bool:
        """Whether few rows are filled up to ``MIN_PACKED_ROWS``."""
        ...

    @property
    def num_weights(self) -> int:
        """Parameters, the bias among them."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]."""
        ...

    def normed(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """RMSNorm with the weight ``norm`` [in], then the linear."""
        ...

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        """The linear, then ``+ residual`` [rows, out]."""
        ...

    def normed_gated(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """``normed``; of its outputs, silu of the first half times the second: SwiGLU."""
        ...


def padding_of(linear: AnyLinear, rows: int) -> int:
    """Rows of zeros that so many rows are filled up with."""
    return max(0, MIN_PACKED_ROWS - rows) if linear.packed else 0


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension of ``x``, with transformers' roundings."""
    ours = x.device.type == "cpu" and x.dim() == 2 and not torch.compiler.is_compiling()
    kernels = optional_library() if ours else None
    if kernels is not None and x.dtype in (torch.float32, torch.bfloat16) and x.stride(1) == 1:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        kernels.fathom_rms_norm(
            x.data_ptr(),
            x.dtype is torch.bfloat16,
            len(x),
            x.stride(0),
            x.shape[1],
            weight.data_ptr(),
            eps,
            out.data_ptr(),
        )
        return out
    # Without a weight, F.rms_norm computes in float32 and rounds once; multiplying afterwards
    # rounds where transformers does. Given the weight, it would skip the first rounding.
    return F.rms_norm(x, x.shape[-1:], None, eps).mul_(weight)


class Linear:
    """``x @ weight.T + bias``.

    Where oneDNN can, the weight is copied into its packed form and the original is not kept, so
    that a decoder's memory stays near its weights' size.

    Args:
        weight: [out, in]. bias: [out] or None, in the weight's dtype and on its device.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.packed = can_pack(weight.dtype, weight.device)
        if self.packed:
            rows = _PACKING_ROWS[weight.dtype]
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        self.weight = weight

    @property
    def num_weights(self) -> int:
        """Parameters, the bias among them."""
        biases = 0 if self.bias is None else self.out_features
        return self.out_features * self.in_features + biases

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to [rows, in]; returns [rows, out] in the same dtype."""
        if self.packed:
            out: Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self.weight, self.bias, "none", [], ""
            )
            return out
        return F.linear(x, self.weight, self.bias)

    def normed(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """See ``AnyLinear``."""
        return self(rms_norm(x, norm, eps))

    def added(self, x: Tensor, residual: Tensor) -> Tensor:
        """See ``AnyLinear``."""
        return self(x).add_(residual)

    def normed_gated(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """See ``AnyLinear``."""
        gate, up = self.normed(x, norm, eps).chunk(2, -1)
        return F.silu(gate).mul_(up)
