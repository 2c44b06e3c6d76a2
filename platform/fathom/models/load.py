"""From a model's directory to a decoder: read the weights, fuse them, pack them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fathom.models.adapters import Adapter
from fathom.models.config import ModelConfig, ModelError
from fathom.models.decoder import Decoder, Layer
from fathom.models.files import weights_digest
from fathom.models.kernel_linear import make_linear, runs_halves
from fathom.models.linear import AnyLinear
from fathom.models.quantized import HEAD_BITS
from fathom.models.resolve import resolve_model
from fathom.models.weights import WeightFiles

__all__ = ["load_decoder", "load_exit_layers", "resolve_model", "weights_digest"]


def load_decoder(
    path: Path,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    layers: tuple[int, int] | None = None,
    embedding: bool = True,
    head: bool = True,
    adapter: Adapter | None = None,
    layer_bits: Sequence[int] = (),
) -> Decoder:
    """Load a model, or the part of it that a stage runs.

    Weights are read, cast, fused, packed and freed one layer at a time.

    Args:
        path: a Hugging Face directory, from ``resolve_model``.
        dtype: float32, bfloat16 or float16, of weights and activations.
        layers: [first, last) to hold; None holds all.
        embedding: hold the embedding table. head: hold the final norm and the LM head.
        adapter: its low-rank changes are added to the weights.
        layer_bits: bits of the weights of each of the model's layers, 0 for those of ``dtype``;
            empty for 0 everywhere. The LM head follows the last layer, with ``HEAD_BITS``.

    Raises:
        ModelError: for a missing or damaged file, a tensor that is missing or misshapen, an
            unsupported architecture, or layers that the model does not have.
    """
    config = ModelConfig.from_directory(path)
    first, last = layers or (0, config.num_layers)
    if not 0 <= first <= last <= config.num_layers:
        raise ModelError(f"{path}: no layers [{first}, {last}); the model has {config.num_layers}.")
    files: _Tensors = WeightFiles(path)
    if adapter is not None and adapter.lora:
        files = _Changed(files, adapter.lora)
    reader = _LayerReader(files, config, dtype, torch.device(device))
    bits = layer_bits or [0] * config.num_layers
    table = norm = lm_head = None
    if embedding:
        table = reader.tensor("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    if head:
        norm = reader.tensor("model.norm.weight", config.hidden_size)
        lm_head = _lm_head(reader, table, HEAD_BITS if bits[-1] else reader.own_bits)
    return Decoder(
        config,
        first,
        [reader.layer(index, bits[index]) for index in range(first, last)],
        dtype=dtype,
        device=torch.device(device),
        embedding=table,
        norm=norm,
        head=lm_head,
    )


def load_exit_layers(decoder: Decoder, adapter: Adapter, bits: int = 0) -> Decoder | None:
    """The exit layers of an adapter as a decoder of layers [k, k + M); None if it has none.

    Args:
        bits: of their weights, 0 for those of the decoder's dtype.

    Raises:
        ModelError: if a tensor is missing or misshapen.
    """
    if not adapter.exit_layers:
        return None
    tensors = {f"model.layers.{name}": tensor for name, tensor in adapter.layers.items()}
    reader = _LayerReader(_Held(tensors), decoder.config, decoder.dtype, decoder.device)
    first, last = adapter.exit_layer, adapter.exit_layer + adapter.exit_layers
    layers = [reader.layer(index, bits) for index in range(first, last)]
    return Decoder(decoder.config, first, layers, dtype=decoder.dtype, device=decoder.device)


def _lm_head(reader: _LayerReader, table: Tensor | None, bits: int) -> AnyLinear:
    """The LM head; ``table`` is the embedding in the model's dtype where it is at hand."""
    config = reader.config
    shape = (config.vocab_size, config.hidden_size)
    rounds = bits in (4, 8)
    if table is not None and config.tie_word_embeddings and not rounds:
        return make_linear(table, bits=bits)
    name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    dtype = torch.float32 if rounds else reader.dtype
    return make_linear(reader.files.tensor(name, shape, dtype, reader.device), bits=bits)


class _Tensors(Protocol):
    """Where tensors come from; see ``WeightFiles.tensor``."""

    def tensor(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
    ) -> Tensor: ...


class _Held:
    """Tensors in memory: an adapter's exit layers."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def tensor(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
    ) -> Tensor:
        tensor = self._tensors.get(name)
        if tensor is None or tuple(tensor.shape) != shape:
            found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
            raise ModelError(
                f"adapter: tensor {name!r} is {found}; the model calls for {list(shape)}: use the "
                "adapter that was trained for this model."
            )
        return tensor.to(device=device, dtype=dtype, copy=True)


class _Changed:
    """A model's tensors with low-rank changes: W + B A, summed in float32."""

    def __init__(self, files: _Tensors, lora: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self._files = files
        self._lora = lora

    def tensor(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
    ) -> Tensor:
        if name not in self._lora:
            return self._files.tensor(name, shape, dtype, device)
        a, b = (part.to(device, torch.float32) for part in self._lora[name])
        if (b.shape[0], a.shape[1]) != shape or a.shape[0] != b.shape[1]:
            raise ModelError(
                f"adapter: the change of {name!r} is {list(b.shape)} x {list(a.shape)}; the model "
                f"calls for {list(shape)}: use the adapter that was trained for this model."
            )
        return self._files.tensor(name, shape, torch.float32, device).addmm_(b, a).to(dtype)


class _LayerReader:
    """Reads and fuses one layer after the other.

    Attributes:
        own_bits: with which our kernels run weights of ``dtype``; 0: torch does.
    """

    def __init__(
        self, files: _Tensors, config: ModelConfig, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.files = files
        self.config = config
        self.dtype = dtype
        self.device = device
        widths = (
            config.hidden_size,
            config.num_heads * config.head_dim,
            config.intermediate_size,
        )
        self.own_bits = 16 if runs_halves(dtype, device, widths) else 0

    def tensor(self, name: str, *shape: int) -> Tensor:
        return self.files.tensor(name, shape, self.dtype, self.device)

    def layer(self, index: int, bits: int) -> Layer:
        bits = bits or self.own_bits
        config, prefix = self.config, f"model.layers.{index}."
        d, inner = config.hidden_size, config.intermediate_size
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        return Layer(
            input_norm=self._norm(f"{prefix}input_layernorm.weight", bits),
            qkv=self._linear(
                attention, {"q_proj": q, "k_proj": kv, "v_proj": kv}, d, config.qkv_bias, bits
            ),
            qk_norm=self._qk_norm(attention),
            output=self._linear(attention, {"o_proj": d}, q, config.output_bias, bits),
            post_norm=self._norm(f"{prefix}post_attention_layernorm.weight", bits),
            gate_up=self._linear(
                mlp, {"gate_proj": inner, "up_proj": inner}, d, config.mlp_bias, bits, gated=True
            ),
            down=self._linear(mlp, {"down_proj": d}, inner, config.mlp_bias, bits),
        )

    def _norm(self, name: str, bits: int) -> Tensor:
        norm = self.tensor(name, self.config.hidden_size)
        return norm.float() if bits else norm

    def _linear(
        self,
        prefix: str,
        parts: dict[str, int],
        inputs: int,
        bias: bool,
        bits: int,
        *,
        gated: bool = False,
    ) -> AnyLinear:
        """Fuse parts that share their input: their outputs, in order, become one linear's."""
        # What is rounded to few bits should not have been rounded to the dtype before.
        dtype = torch.float32 if bits in (4, 8) else self.dtype

        def read(name: str, *shape: int) -> Tensor:
            return self.files.tensor(name, shape, dtype, self.device)

        weights = [read(f"{prefix}{part}.weight", out, inputs) for part, out in parts.items()]
        biases = [read(f"{prefix}{part}.bias", out) for part, out in parts.items() if bias]
        bias_of_all = _cat(biases) if biases else None
        return make_linear(_cat(weights), bias_of_all, bits=bits, gated=gated)

    def _qk_norm(self, prefix: str) -> Tensor | None:
        if not self.config.qk_norm:
            return None
        dim = self.config.head_dim
        q = self.tensor(f"{prefix}q_norm.weight", dim).expand(self.config.num_heads, dim)
        k = self.tensor(f"{prefix}k_norm.weight", dim).expand(self.config.num_kv_heads, dim)
        return torch.cat((q, k))


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
