"""A decoder-only transformer over ragged rows: layers [first, last), embedding and head.

The decoder knows nothing of sequences or of paging. A batch is a flat list of rows, each a token
of some sequence at some position; the caller's ``attend`` stores keys and values and looks back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.models.config import ModelConfig
from fathom.models.errors import ModelError
from fathom.models.linear import AnyLinear, Linear, padding_of, rms_norm
from fathom.models.rope import RotaryEmbedding, rotate_
from fathom.models.rounded_linear import RoundedLinear

Store = Callable[[int, Tensor], None]
"""``store(layer, kv)``: keeps keys and values, which are as in ``Attend``."""

Attend = Callable[[int, Tensor, Tensor], Tensor]
"""``attend(layer, q, kv) -> out``: causal attention of one layer over the batch's rows.

``layer`` counts from the model's first layer. ``q`` is [rows, H, D]; ``kv`` is [rows, 2 * Hkv, D],
keys in the first Hkv heads and values in the last, both with the rotation applied. It stores keys
and values, and returns [rows, H * D] in q's dtype, attending with scale 1 / sqrt(D). ``q`` and
``kv`` are strided views of one buffer that the decoder gives up: copy what must outlive the call.
"""


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one layer, fused.

    Attributes:
        input_norm, post_norm: [d], in the dtype that their linears take.
        qkv: d -> (H + 2 * Hkv) * D, in the order q, k, v.
        qk_norm: [H + Hkv, D], one weight a head, or None. output: H * D -> d.
        gate_up: d -> 2 * intermediate, gate first. down: intermediate -> d.
    """

    input_norm: Tensor
    qkv: AnyLinear
    qk_norm: Tensor | None
    output: AnyLinear
    post_norm: Tensor
    gate_up: AnyLinear
    down: AnyLinear

    @property
    def num_weights(self) -> int:
        """Parameters of the layer."""
        norms = self.input_norm.numel() + self.post_norm.numel()
        linears = (self.qkv, self.output, self.gate_up, self.down)
        return norms + sum(linear.num_weights for linear in linears)


class Decoder:
    """Layers [first, last) of a model, with the embedding and the head where they are loaded.

    Build one with ``fathom.models.load.load_decoder``. All methods run under inference mode.

    Attributes:
        config: the whole model's shape. first, last: the layers held.
        dtype, device: of weights and activations.
        embedding: [V, d] or None. norm: [d] or None. head: d -> V, or None.
    """

    def __init__(
        self,
        config: ModelConfig,
        first: int,
        layers: list[Layer],
        *,
        dtype: torch.dtype,
        device: torch.device,
        embedding: Tensor | None = None,
        norm: Tensor | None = None,
        head: AnyLinear | None = None,
    ) -> None:
        self.config = config
        self.first = first
        self.last = first + len(layers)
        self.layers = layers
        self.dtype = dtype
        self.device = device
        self.embedding = embedding
        self.norm = norm
        self.head = head
        self._eps = config.rms_norm_eps
        # The two parts of a layer, before and after attention; ``compile`` replaces them.
        self._before: Callable[[Layer, Tensor, Tensor, Tensor], Tensor] = self._qkv
        self._after: Callable[[Layer, Tensor, Tensor], Tensor] = self._mlp
        self.rotary = RotaryEmbedding(
            config.rope_inv_freq, config.rope_attention_scaling, dtype, device
        )

    def compile(self) -> None:
        """Let torch compile what layers do before and after attention, at their first run.

        Raises:
            ModelError: for layers that our own kernels run, or whose weights oneDNN has packed:
                torch cannot compile them.
        """
        if any(
            layer.qkv.packed or not isinstance(layer.qkv, Linear | RoundedLinear)
            for layer in self.layers
        ):
            raise ModelError(
                f"compile: on {self.device.type} with {str(self.dtype)[6:]}, our own kernels or "
                "oneDNN's run these layers, which torch cannot compile: leave it out."
            )
        # Rows change from pass to pass: they must not be compiled in.
        self._before = torch.compile(self._qkv, dynamic=True)
        self._after = torch.compile(self._mlp, dynamic=True)

    @property
    def num_weights(self) -> int:
        """Parameters that are held: in the layers, the embedding and the head."""
        tensors = [tensor.numel() for tensor in (self.embedding, self.norm) if tensor is not None]
        heads = [] if self.head is None else [self.head.num_weights]
        return sum(tensors) + sum(heads) + sum(layer.num_weights for layer in self.layers)

    @property
    def layer_params(self) -> int:
        """Weights that one row is multiplied with in one layer."""
        return self.config.layer_params

    @property
    def head_params(self) -> int:
        """Weights that one row is multiplied with in the LM head."""
        return self.config.head_params

    @torch.inference_mode()
    def embed(self, token_ids: Tensor) -> Tensor:
        """Look up token embeddings.

        Args:
            token_ids: int64 [rows].

        Returns:
            [rows, d] in the model's dtype.

        Raises:
            RuntimeError: if the decoder was loaded without the embedding.
        """
        if self.embedding is None:
            raise RuntimeError("this decoder was loaded without the embedding")
        return F.embedding(token_ids, self.embedding)

    @torch.inference_mode()
    def run(
        self, hidden: Tensor, positions: Tensor, first: int, last: int, attend: Attend
    ) -> Tensor:
        """Run layers [first, last) over ragged rows.

        Args:
            hidden: [rows, d] in the model's dtype, the residual stream before layer ``first``;
                not modified. rows >= 1.
            positions: int64 [rows], each row's position in its own sequence, from 0.
            attend: stores keys and values and attends; see ``Attend``.

        Returns:
            [rows, d], the residual stream after layer ``last - 1``, before the final norm.

        Raises:
            RuntimeError: if one of the layers is not held.
        """
        if not self.first <= first <= last <= self.last:
            raise RuntimeError(
                f"layers [{first}, {last}) asked of a decoder that holds "
                f"[{self.first}, {self.last})"
            )
        rows = len(hidden)
        padding = self._padding(rows, first, last)
        if padding:
            hidden = F.pad(hidden, (0, 0, 0, padding))
            positions = F.pad(positions, (0, padding))
        cos, sin = self.rotary(positions)
        for index in range(first, last):
            hidden = self._layer(index, hidden, rows, cos, sin, attend)
        return hidden[:rows] if padding else hidden

    @torch.inference_mode()
    def project_kv(
        self, hidden: Tensor, positions: Tensor, first: int, last: int, store: Store
    ) -> None:
        """Keys and values of layers [first, last) from one state: CALM's state copying.

        Args:
            hidden: [rows, d], taken for the input of each of the layers; not modified.
            positions: int64 [rows]. store: see ``Store``.
        """
        rows = len(hidden)
        padding = self._padding(rows, first, last)
        if padding:
            hidden = F.pad(hidden, (0, 0, 0, padding))
            positions = F.pad(positions, (0, padding))
        cos, sin = self.rotary(positions)
        for index in range(first, last):
            qkv = self._qkv(self.layers[index - self.first], hidden, cos, sin)
            store(index, qkv[:rows, self.config.num_heads :])

    def _padding(self, rows: int, first: int, last: int) -> int:
        """Rows of zeros that a pass over layers [first, last) is filled up with."""
        own = self.layers[first - self.first : last - self.first]
        return padding_of(own[0].qkv, rows) if own else 0

    def _layer(
        self, index: int, hidden: Tensor, rows: int, cos: Tensor, sin: Tensor, attend: Attend
    ) -> Tensor:
        """One layer; ``rows`` of the rows are the batch's, the rest padding."""
        layer, heads = self.layers[index - self.first], self.config.num_heads
        qkv = self._before(layer, hidden, cos, sin)
        attended = attend(index, qkv[:rows, :heads], qkv[:rows, heads:])
        if rows < len(hidden):
            attended = F.pad(attended, (0, 0, 0, len(hidden) - rows))
        return self._after(layer, attended, hidden)

    def _mlp(self, layer: Layer, attended: Tensor, hidden: Tensor) -> Tensor:
        """What follows attention: [rows, H * D] and the residual stream [rows, d] -> [rows, d]."""
        hidden = layer.output.added(attended, hidden)
        inner = layer.gate_up.normed_gated(hidden, layer.post_norm, self._eps)
        return layer.down.added(inner, hidden)

    def _qkv(self, layer: Layer, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[rows, d] -> [rows, H + 2 * Hkv, D]: queries and keys rotated, then values."""
        rotated = self.config.num_heads + self.config.num_kv_heads
        qkv = layer.qkv.normed(hidden, layer.input_norm, self._eps)
        qkv = qkv.view(hidden.shape[0], -1, self.config.head_dim)
        qk = qkv[:, :rotated]
        if layer.qk_norm is not None:
            qk.copy_(rms_norm(qk, layer.qk_norm, self._eps))
        rotate_(qk, cos, sin)
        return qkv

    @torch.inference_mode()
    def final_norm(self, hidden: Tensor) -> Tensor:
        """Apply the model's last RMSNorm to [rows, d].

        Raises:
            RuntimeError: if the decoder was loaded without the head.
        """
        if self.norm is None:
            raise RuntimeError("this decoder was loaded without the head")
        return rms_norm(hidden, self.norm, self._eps)

    @torch.inference_mode()
    def project(self, normed: Tensor) -> Tensor:
        """Apply the LM head alone.

        Args:
            normed: [rows, d], from ``final_norm``.

        Returns:
            [rows, V] logits in the model's dtype.

        Raises:
            RuntimeError: if the decoder was loaded without the head.
        """
        if self.head is None:
            raise RuntimeError("this decoder was loaded without the head")
        padding = padding_of(self.head, len(normed))
        if padding:
            return self.head(F.pad(normed, (0, 0, 0, padding)))[: len(normed)]
        return self.head(normed)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head: [rows, d] -> [rows, V] in the model's dtype."""
        return self.project(self.final_norm(hidden))
