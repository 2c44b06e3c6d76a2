"""Keys and values between blocks of the store and the cache of a vLLM attention layer.

vLLM gives every layer's cache as [num_blocks, num_kv_heads, block_size, 2 * head_dim]. How keys and
values lie within a block is the backend's own affair: FlashAttention keeps a token's key and value
beside each other, the CPU kernels transpose or interleave keys and values for the instructions at
hand. So a backend that packs is asked once, by letting it write a block of known numbers.

Keys lie rotated in both, with Hugging Face's convention of halves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fathom.kvstore.store import Block

Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Writes keys and values, each [tokens, num_kv_heads, head_dim], into a layer's cache at slots,
[tokens] int64: ``write(cache, keys, values, slots)``."""

_DIGIT = 128
"""Numbers below this are exact in every dtype of a cache."""


def write_plain(
    cache: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
) -> None:
    """The ``Write`` of a backend with a token's key and value beside each other."""
    size = cache.shape[2]
    cache[slots // size, :, slots % size] = torch.cat([keys, values], dim=2)


@dataclass(frozen=True, slots=True)
class Packing:
    """Where a backend keeps the numbers of a block.

    Attributes:
        places: [2, block_size, head_dim] int64; of keys, then of values, the place of each number
            in the block_size * 2 * head_dim numbers of a head; None where a token's key and value
            lie beside each other.
    """

    places: torch.Tensor | None = None

    @classmethod
    def probe(cls, write: Write, block_size: int, head_dim: int, dtype: torch.dtype) -> Packing:
        """Find it out by writing.

        Raises:
            ValueError: if the backend stores something else than the numbers that it is given.
        """
        count = 2 * block_size * head_dim
        numbers = torch.arange(count)
        keys, values = numbers.view(2, block_size, 1, head_dim)
        slots = torch.arange(block_size)
        found, scale = torch.zeros(count, dtype=torch.int64), 1
        while scale < count:
            cache = torch.zeros(1, 1, block_size, 2 * head_dim, dtype=dtype)
            parts = [(part // scale % _DIGIT).to(dtype) for part in (keys, values)]
            write(cache, parts[0], parts[1], slots)
            found += cache.flatten().float().long() * scale
            scale *= _DIGIT
        places = torch.empty(count, dtype=torch.int64).fill_(-1)
        inside = (found >= 0) & (found < count)
        places[found[inside]] = torch.arange(count)[inside]
        if bool((places < 0).any()):
            raise ValueError("the attention backend does not keep keys and values as they are")
        return cls(places.view(2, block_size, head_dim))

    def read(self, blocks: torch.Tensor) -> torch.Tensor:
        """Keys and values of whole blocks.

        Args:
            blocks: [n, num_kv_heads, block_size, 2 * head_dim], of a layer's cache.

        Returns:
            [2 * num_kv_heads, n * block_size, head_dim], keys first.
        """
        n, heads, size, width = blocks.shape
        if self.places is None:
            split = blocks.view(n, heads, size, 2, width // 2).permute(3, 1, 0, 2, 4)
        else:
            places = self.places.view(-1)
            packed = blocks.reshape(n * heads, -1)
            split = packed[:, places].view(n, heads, 2, size, width // 2).permute(2, 1, 0, 3, 4)
        return split.reshape(2 * heads, n * size, width // 2)


def from_blocks(
    blocks: Sequence[Block], layers: int, layer_shape: tuple[int, int, int], dtype: torch.dtype
) -> torch.Tensor:
    """Keys and values of successive blocks of the store.

    Args:
        blocks: each with the keys and values of its leading layers first; what is behind them is
            left alone. layers: how many of them are wanted. layer_shape: see ``KVLayout``.

    Returns:
        [layers, tokens, 2 * num_kv_heads, head_dim] of ``dtype``.

    Raises:
        ValueError: for a block that is too short.
    """
    heads, size, width = layer_shape
    length = layers * heads * size * width * dtype.itemsize
    if any(len(block) < length for block in blocks):
        raise ValueError(f"a block has fewer than {length} bytes")
    raw = torch.from_numpy(np.stack([block[:length] for block in blocks])).view(dtype)
    kv = raw.view(len(blocks), layers, heads, size, width).permute(1, 0, 3, 2, 4)
    return kv.reshape(layers, len(blocks) * size, heads, width)


def to_blocks(kv: torch.Tensor, block_size: int) -> list[Block]:
    """Blocks of the store; the other way round from ``from_blocks``.

    Args:
        kv: [layers, 2 * num_kv_heads, tokens, head_dim], tokens a multiple of ``block_size``.
    """
    layers, heads, tokens, width = kv.shape
    parts = kv.view(layers, heads, tokens // block_size, block_size, width).permute(2, 0, 1, 3, 4)
    raw = parts.contiguous().view(torch.uint8).numpy()
    return list(raw.reshape(tokens // block_size, -1))
