"""Rotary position embeddings, with transformers' frequencies for every kind of scaling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fathom.kernels.compiled import optional_library

SUPPORTED_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


class RopeError(ValueError):
    """A kind of rotary embedding that the decoder does not implement."""


def rope_frequencies(hf_config: Any) -> tuple[tuple[float, ...], float]:
    """Compute the rotary frequencies of a model with transformers' own functions.

    Args:
        hf_config: a transformers configuration with ``rope_parameters``.

    Returns:
        [head_dim / 2] inverse frequencies in radians a position (float32 values), and the factor
        on cos and sin. They hold for sequences of up to ``exact_length`` tokens.

    Raises:
        RopeError: for an unknown ``rope_type``, or a rotation of only a part of each head.
    """
    hf_config.standardize_rope_params()
    parameters = hf_config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind not in SUPPORTED_ROPE_TYPES:
        raise RopeError(
            f"unsupported rope_type {kind!r}; supported: {', '.join(SUPPORTED_ROPE_TYPES)}."
        )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise RopeError("partial_rotary_factor below 1 is not supported.")
    if kind == "default":  # transformers leaves this one to each model's own class
        heads = hf_config.num_attention_heads
        dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
        exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        return tuple((1.0 / parameters["rope_theta"] ** exponent).tolist()), 1.0
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))
    return tuple(inv_freq.float().tolist()), float(scaling)


def exact_length(hf_config: Any) -> int:
    """Tokens up to which the frequencies do not depend on the sequence's length.

    Dynamic NTK and LongRoPE change their frequencies once a sequence outgrows a length, which
    would turn every cached key stale; up to that length they are constant, and so we stop there.
    """
    parameters = hf_config.rope_parameters
    kind = parameters.get("rope_type", "default")
    longest = int(hf_config.max_position_embeddings)
    if kind == "longrope":
        return min(longest, int(parameters["original_max_position_embeddings"]))
    if kind == "yarn" and parameters.get("original_max_position_embeddings"):
        # Checkpoints state either the stretched length or the original one.
        stretched = parameters["original_max_position_embeddings"] * parameters["factor"]
        return max(longest, int(stretched))
    return longest


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
