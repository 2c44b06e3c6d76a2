"""How a model is split and sized, from its configuration alone: what both stages must agree on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from fathom.attention.pool import KVPool
from fathom.config import ConfigError, EngineConfig
from fathom.engine.info import EngineInfo
from fathom.kvstore.keys import KeyRoot
from fathom.ledger import ModelCosts
from fathom.models.adapters import Adapter
from fathom.models.bits import Bits
from fathom.models.config import ModelConfig

_MIN_BLOCKS = 4
"""The null block, one for a copy on write, and two to work with."""


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """A model split at its exit layer, with a KV pool for each stage.

    Holds no tensors: an adapter's are packed into copies while the stages are built.

    Attributes:
        weights_digest: of the weights and the model's shape.
        exit_layer: k. exit_layers: M, layers that only the shallow path has.
        adapter: its name, empty for none. adapter_digest: its identity. changes_model: whether it
            changes the full path.
        num_blocks: of each stage's pool, the null block included.
    """

    config: EngineConfig
    model: ModelConfig
    weights_digest: str
    exit_layer: int
    exit_layers: int
    adapter: str
    adapter_digest: str
    changes_model: bool
    num_blocks: int
    max_model_len: int

    @classmethod
    def make(
        cls,
        config: EngineConfig,
        model: ModelConfig,
        *,
        exit_layer: int,
        weights_digest: str,
        adapter: Adapter | None,
    ) -> SplitPlan:
        """Size the pools.

        Raises:
            ConfigError: if they would be too small.
        """
        exit_layers = adapter.exit_layers if adapter else 0
        num_blocks = _num_blocks(config, model, exit_layers)
        return cls(
            config=config,
            model=model,
            weights_digest=weights_digest,
            exit_layer=exit_layer,
            exit_layers=exit_layers,
            adapter=adapter.metadata.get("name", config.adapter) if adapter else "",
            adapter_digest=adapter.digest if adapter else "",
            changes_model=adapter is not None and adapter.changes_model,
            num_blocks=num_blocks,
            max_model_len=_max_model_len(config, model.max_position, num_blocks),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and KV blocks."""
        return _dtype(self.config)

    @property
    def layer_bits(self) -> list[int]:
        """Bits of the weights of each layer, 0 for those of the dtype."""
        return self.config.bits.of_layers(self.exit_layer, self.model.num_layers)

    @property
    def deep_adapter(self) -> str:
        """Identity of what changes the full path, empty for nothing."""
        return self.adapter_digest if self.changes_model else ""

    def roots(self, salt: str, drafts: bool) -> tuple[KeyRoot, KeyRoot]:
        """Key roots of the two stages' blocks.

        Low-rank changes touch every block. Exit layers touch those of the shallow stage, and have
        keys and values only where a request drafts.
        """
        k, last = self.exit_layer, self.model.num_layers
        own = drafts and self.exit_layers
        # An adapter may do both, and a block without exit layers is of no use to a draft.
        shallow = f"{self.adapter_digest}+exit" if own else self.deep_adapter
        digest, dtype = self.weights_digest, self.config.dtype
        return (
            KeyRoot(digest, shallow, 0, k, dtype, salt),
            KeyRoot(digest, self.deep_adapter, k, last, dtype, salt),
        )

    def info(self, exit_vocab: int, attention: str) -> EngineInfo:
        """What an engine of this plan tells of itself.

        Args:
            exit_vocab: tokens that are scored. attention: the backend that runs.
        """
        return EngineInfo(
            model=self.config.model,
            num_layers=self.model.num_layers,
            adapter=self.adapter,
            adapter_digest=self.adapter_digest,
            exit_layer=self.exit_layer,
            exit_depth=self.exit_layer + self.exit_layers,
            exit_vocab=exit_vocab,
            vocab_size=self.model.vocab_size,
            max_model_len=self.max_model_len,
            dtype=self.config.dtype,
            quantization=self.config.bits.name,
            attention=attention,
            eos_token_ids=self.model.eos_token_ids,
            weights_digest=self.weights_digest,
            num_blocks=self.num_blocks,
            block_size=self.config.block_size,
        )

    def costs(self, exit_head_params: int) -> ModelCosts:
        """What the ledger must know of the model."""
        model = self.model
        return ModelCosts(
            layer_params=model.layer_params,
            qkv_params=model.qkv_params,
            attention_width=model.num_heads * model.head_dim,
            kv_bytes=2 * model.num_kv_heads * model.head_dim * self.dtype.itemsize,
            exit_layer=self.exit_layer,
            num_layers=model.num_layers,
            exit_layers=self.exit_layers,
            exit_head_params=exit_head_params,
            lm_head_params=model.head_params,
        )


def model_digest(weights_digest: str, model: ModelConfig, bits: Bits = Bits()) -> str:
    """Equal weights under another shape (RoPE scaling, norm epsilon) are another model; rounded to
    fewer bits as well.
    """
    quantized = "" if bits == Bits() else f"-{bits.name}"
    return f"{weights_digest}-{hashlib.sha256(repr(model).encode()).hexdigest()}{quantized}"


def exit_layer_of(config: EngineConfig, model: ModelConfig, adapter: Adapter | None) -> int:
    """k, from the settings, the adapter, or a third of the model's layers.

    Raises:
        ConfigError: if they contradict each other.
    """
    num_layers = model.num_layers
    if adapter and adapter.exit_layer + adapter.exit_layers >= num_layers:
        raise ConfigError(
            f"adapter: its exit is {adapter.exit_layer + adapter.exit_layers} layers deep, the "
            f"model has {num_layers}: use the adapter that was trained for this model."
        )
    layer = config.exit_layer or (adapter.exit_layer if adapter else max(1, num_layers // 3))
    if not 1 <= layer < num_layers:
        raise ConfigError(f"exit_layer must be from 1 to {num_layers - 1}, got {layer}.")
    if adapter and adapter.exit_layer != layer:
        raise ConfigError(
            f"exit_layer must be {adapter.exit_layer}, the layer that the adapter was trained on, "
            f"got {layer}; adapter: none works at every layer."
        )
    return layer


def _dtype(config: EngineConfig) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype


def _num_blocks(config: EngineConfig, model: ModelConfig, exit_layers: int) -> int:
    """Blocks of each stage's pool, as many as the memory holds."""
    shape = (model.num_kv_heads, model.head_dim, config.block_size, _dtype(config))
    block_bytes = KVPool.block_bytes(model.num_layers + exit_layers, *shape)
    num_blocks = config.kv_cache_bytes // block_bytes
    if num_blocks < _MIN_BLOCKS:
        raise ConfigError(
            f"kv_cache_bytes must be at least {_MIN_BLOCKS * block_bytes} ({_MIN_BLOCKS} blocks "
            f"of {block_bytes} bytes), got {config.kv_cache_bytes}."
        )
    return num_blocks


def _max_model_len(config: EngineConfig, max_position: int, num_blocks: int) -> int:
    # One block is the null block, one more serves a copy on write.
    capacity = (num_blocks - 2) * config.block_size
    length = config.max_model_len or min(max_position, capacity)
    if length > max_position:
        raise ConfigError(
            f"max_model_len must be at most {max_position}, the model's longest sequence, "
            f"got {length}."
        )
    if length > capacity:
        raise ConfigError(
            f"max_model_len must be at most {capacity}, what kv_cache_bytes "
            f"({config.kv_cache_bytes}) holds, got {length}: raise kv_cache_bytes or lower it."
        )
    return length
