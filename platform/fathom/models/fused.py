"""Layers of few bits as the kernels run them: many of them in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from fathom.attention.paged import PagedPass
from fathom.kernels.compiled import Layer, library
from fathom.models.decoder import Decoder
from fathom.models.decoder import Layer as DecoderLayer
from fathom.models.kernel_linear import KernelLinear
from fathom.models.linear import AnyLinear


class FusedLayers:
    """Layers [first, last) of a decoder, which holds the weights.

    Build one with ``fuse``.
    """

    def __init__(self, decoder: Decoder, first: int, layers: Sequence[DecoderLayer]) -> None:
        self._decoder = decoder
        self._first = first
        self._layers = (Layer * len(layers))(*map(_pointers, layers))
        self._kept = layers
        self._run = library().fathom_layers
        self._eps = decoder.config.rms_norm_eps

    @torch.inference_mode()
    def run(
        self, hidden: Tensor, positions: Tensor, first: int, last: int, rows: PagedPass, pool: int
    ) -> Tensor:
        """``Decoder.run`` of layers [first, last).

        Args:
            rows: attention of all rows. pool: the pool's layer for ``first``.
        """
        cos, sin = self._decoder.rotary(positions)
        data = rows.pool.data
        hidden = hidden.clone(memory_format=torch.contiguous_format)
        self._run(
            ctypes.addressof(self._layers[first - self._first]),
            last - first,
            rows.address,
            data[pool].data_ptr(),
            data.stride(0) * data.element_size(),
            data.shape[2],
            hidden.data_ptr(),
            self._eps,
            rows.scale,
            cos.data_ptr(),
            sin.data_ptr(),
            torch.get_num_threads(),
        )
        return hidden


def fuse(decoder: Decoder, first: int, last: int) -> FusedLayers | None:
    """Layers [first, last) for the kernels; None if one of them is not of few bits."""
    layers = decoder.layers[first - decoder.first : last - decoder.first]
    linears = [(own.qkv, own.output, own.gate_up, own.down) for own in layers]
    if not layers or not all(isinstance(each, KernelLinear) for own in linears for each in own):
        return None
    return FusedLayers(decoder, first, layers)


def _pointers(layer: DecoderLayer) -> Layer:
    def address(linear: AnyLinear) -> int:
        assert isinstance(linear, KernelLinear)
        return linear.address

    return Layer(
        layer.input_norm.data_ptr(),
        address(layer.qkv),
        None if layer.qk_norm is None else layer.qk_norm.data_ptr(),
        address(layer.output),
        layer.post_norm.data_ptr(),
        address(layer.gate_up),
        address(layer.down),
    )
