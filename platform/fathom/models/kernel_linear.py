"""Linear layers that our CPU kernels run: weights of 4, 8 or 16 bits."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.kernels.compiled import Weight, library, optional_library
from fathom.models.errors import ModelError
from fathom.models.linear import AnyLinear, Linear
from fathom.models.quantized import GROUP, Rounded, round_weight
from fathom.models.rounded_linear import RoundedLinear

_COLUMNS = 32  # outputs of a block
_LANES = 16  # outputs of a half block
_PLAIN, _ADD, _SILU_MUL = 0, 1, 2


class KernelLinear:
    """``x @ weight.T + bias``, and what comes before and after it, in one call of our kernels.

    With 4 or 8 bits the weight is rounded, and so are activations: to 8 bits, a scale for every 32
    of a row, as in llama.cpp. ``fathom/kernels/linear.cpp`` says what is computed. A row's result
    does not depend on the rows beside it, bit for bit.

    Args:
        weight: [out, in] of any floating type on a CPU. bias: [out] or None.
        bits: 4, 8, or 16 for bfloat16.
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
            if self.out_features % (2 * _LANES):
                raise ModelError(
                    f"quantization needs an inner width that is a multiple of {GROUP}, got "
                    f"{self.out_features // 2}: leave it off for this model."
                )
            weight, bias = _interleave(weight), None if bias is None else _interleave(bias)
        self._scales: Tensor | None = None
        if bits == 16:
            self._codes = _pack_halves(weight)
        else:
            self._codes, self._scales = _pack(round_weight(weight, bits), bits)
        self._bias = None if bias is None else bias.float().contiguous()
        self._weight = Weight(
            self._codes.data_ptr(),
            None if self._scales is None else self._scales.data_ptr(),
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
        return self._codes.nbytes + (0 if self._scales is None else self._scales.nbytes)

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


def runs_halves(dtype: torch.dtype, device: torch.device, widths: Iterable[int]) -> bool:
    """Whether the kernels take weights of ``dtype`` as they are, in layers of such widths."""
    if dtype is not torch.bfloat16 or device.type != "cpu" or any(w % GROUP for w in widths):
        return False
    kernels = optional_library()
    return kernels is not None and bool(kernels.fathom_has_bfloat16())


def make_linear(
    weight: Tensor, bias: Tensor | None = None, *, bits: int = 0, gated: bool = False
) -> AnyLinear:
    """A linear layer with weights of so many bits; 0 leaves them to torch, in their dtype.

    Where our kernels do not run, on a GPU or without a compiler, torch runs few bits as well.

    Args:
        weight: [out, in]. bias: [out] or None. gated: see ``KernelLinear``.
    """
    if not bits:
        return Linear(weight, bias)
    if weight.device.type != "cpu" or optional_library() is None:
        return RoundedLinear(weight, bias, bits=bits)
    return KernelLinear(weight, bias, bits=bits, gated=gated)


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


def _pack_halves(weight: Tensor) -> Tensor:
    """bfloat16 in the kernels' layout, outputs filled up to whole blocks."""
    out, inputs = weight.shape
    padded = F.pad(weight.to(torch.bfloat16), (0, 0, 0, -out % _COLUMNS))
    # [blocks, 32 outputs, steps, 2 inputs] -> [blocks, steps, outputs, inputs]
    return padded.view(-1, _COLUMNS, inputs // 2, 2).transpose(1, 2).contiguous()
