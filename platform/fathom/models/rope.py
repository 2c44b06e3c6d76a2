"""Rotary position embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from fathom.kernels.compiled import optional_library


class RotaryEmbedding:
    """cos and sin for given positions.

    Args:
        inv_freq: [D / 2] radians a position. attention_scaling: factor on cos and sin.
    """

    def __init__(
        self,
        inv_freq: tuple[float, ...],
        attention_scaling: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.inv_freq = torch.tensor(inv_freq, dtype=torch.float32, device=device)
        self.attention_scaling = attention_scaling
        self.dtype = dtype

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the two factors that ``rotate_`` takes.

        Args:
            positions: int64 [rows], 0 for a sequence's first token.

        Returns:
            cos and signed sin, each [rows, 1, D] in the model's dtype: computed in float32, then
            rounded, as in transformers. The first half of sin is negated.
        """
        angles = positions.to(torch.float32)[:, None] * self.inv_freq
        cos, sin = angles.cos(), angles.sin()
        if self.attention_scaling != 1.0:
            cos, sin = cos * self.attention_scaling, sin * self.attention_scaling
        cos, sin = cos.to(self.dtype), sin.to(self.dtype)
        return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


def rotate_(heads: Tensor, cos: Tensor, signed_sin: Tensor) -> None:
    """Rotate query and key heads in place.

    transformers' ``x * cos + rotate_half(x) * sin``, with its roundings: rotate_half is a roll by
    half a head whose negated half has moved into ``signed_sin``, which is exact.

    Args:
        heads: [rows, H, D]. cos, signed_sin: [rows, 1, D], from ``RotaryEmbedding``.
    """
    ours = heads.device.type == "cpu" and not torch.compiler.is_compiling()
    kernels = optional_library() if ours else None
    if kernels is not None and heads.dtype in (torch.float32, torch.bfloat16):
        rows, count, dim = heads.shape
        kernels.fathom_rotate(
            heads.data_ptr(),
            heads.dtype is torch.bfloat16,
            rows,
            heads.stride(0),
            count,
            dim,
            cos.data_ptr(),
            signed_sin.data_ptr(),
        )
        return
    rolled = heads.roll(heads.shape[-1] // 2, -1).mul_(signed_sin)
    heads.mul_(cos).add_(rolled)
