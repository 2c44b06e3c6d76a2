"""The model in training: a shallow path that ends at an exit head, and the deep path beside it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fathom.training.errors import TrainingError
from fathom.training.examples import IGNORED, Batch

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class ExitHead(nn.Module):
    """norm(h + A h), to be multiplied by rows of the LM head (``fathom.models.heads``).

    Attributes:
        norm_weight: [d]. adapter: A, [d, d], or None.
    """

    def __init__(self, norm_weight: Tensor, eps: float, *, adapter: bool) -> None:
        super().__init__()
        self.eps = eps
        self.norm_weight = nn.Parameter(norm_weight.detach().float().clone())
        size = len(norm_weight)
        self.adapter = nn.Parameter(torch.zeros(size, size)) if adapter else None

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, d] states of any dtype -> [n, d] float32 normed states."""
        if self.adapter is not None:
            hidden = hidden + F.linear(hidden, self.adapter)
        return F.rms_norm(hidden.float(), self.norm_weight.shape, self.norm_weight, self.eps)


@dataclass(frozen=True, slots=True)
class Shape:
    """What is trained, and where it ends.

    Attributes:
        exit_layer: k, layers that the two paths share.
        exit_layers: further layers of the shallow path alone, M; copies of layers [k, k + M) at
            the start. With them the shared layers can stay frozen and the full path what it was.
        tune: ``exit`` (shared layers frozen), ``lora`` or ``full``.
        lora_rank, lora_alpha: of ``lora`` (FREE: 64, 128).
        head_adapter: whether the head has a linear map before its norm.
    """

    exit_layer: int
    exit_layers: int = 0
    tune: str = "lora"
    lora_rank: int = 64
    lora_alpha: int = 128
    head_adapter: bool = False


@dataclass(frozen=True, slots=True)
class States:
    """Hidden states of one pass at the rows that have a label.

    Attributes:
        exit: [n, d] after the shallow path's last layer, before the head.
        layers: layer -> [n, d] after that many shared layers; those asked for.
        deep: [n, d] after all layers, before the final norm; None where they did not run.
    """

    exit: Tensor
    layers: dict[int, Tensor]
    deep: Tensor | None


class ShallowDeep(nn.Module):
    """A Hugging Face decoder with an exit.

    Args:
        base: a causal language model of the Llama shape; for ``lora`` it gets adapters.

    Attributes:
        branch: the exit layers. head: the exit head.

    Raises:
        TrainingError: for a model of another shape, or layers that it does not have.
    """

    def __init__(self, base: Any, shape: Shape) -> None:
        super().__init__()
        inner: Any = getattr(base, "model", None)
        if not all(hasattr(inner, name) for name in ("layers", "norm", "rotary_emb")):
            raise TrainingError(
                f"{type(base).__name__} has no model.layers, norm and rotary_emb: exits are "
                "trained for decoders of the Llama shape."
            )
        self.num_layers = len(inner.layers)
        if not 0 < shape.exit_layer < self.num_layers:
            raise TrainingError(
                f"exit_layer must be from 1 to {self.num_layers - 1}, got {shape.exit_layer}."
            )
        if not 0 <= shape.exit_layers < self.num_layers - shape.exit_layer:
            raise TrainingError(
                f"exit_layers must be from 0 to {self.num_layers - shape.exit_layer - 1}, so that "
                f"the shallow path stays the shorter one, got {shape.exit_layers}."
            )
        if shape.tune == "lora" and min(shape.lora_rank, shape.lora_alpha) < 1:
            raise TrainingError(
                f"lora_rank and lora_alpha must be at least 1, got {shape.lora_rank} and "
                f"{shape.lora_alpha}."
            )
        self.shape = shape
        first, last = shape.exit_layer, shape.exit_layer + shape.exit_layers
        self.branch = nn.ModuleList(copy.deepcopy(layer) for layer in inner.layers[first:last])
        # They keep their own index into the attention cache that transformers never sees here.
        self.branch.float()
        self.head = ExitHead(inner.norm.weight, _eps(inner.norm), adapter=shape.head_adapter)
        self.base = _with_lora(base, shape) if shape.tune == "lora" else base
        if shape.tune == "exit":
            self.base.requires_grad_(False)
        elif shape.tune == "full":
            self.base.float().requires_grad_(True)
        for parameter in (*self.branch.parameters(), *self.head.parameters()):
            parameter.requires_grad_(True)
        self._embed, self._layers = inner.embed_tokens, inner.layers
        self.norm, self._rotary = inner.norm, inner.rotary_emb
        self.lm_head = base.lm_head
        self.recompute = False

    @property
    def trains_shared(self) -> bool:
        """Whether layers that both paths use are trained, so that the deep path can drift."""
        return self.shape.tune != "exit"

    def forward(
        self,
        token_ids: Tensor,
        rows: Tensor,
        *,
        deep: bool,
        keep: Sequence[int] = (),
        skip: frozenset[int] = frozenset(),
        exit_at: int | None = None,
    ) -> States:
        """Run the shallow path, and the deep path where asked.

        Args:
            token_ids: [batch, length] int64, filled on the right.
            rows: [batch, length] bool, which rows' states are wanted.
            keep: shared layers whose output is wanted as well.
            skip: shared layers left out of this pass (layer dropout).
            exit_at: the exit's layer in this pass (a curriculum); k if left out.
        """
        exit_at = exit_at or self.shape.exit_layer
        wanted = set(keep)
        hidden = self._embed(token_ids)
        rotary = self._rotary_of(hidden)
        kept: dict[int, Tensor] = {}
        exit_state: Tensor | None = None
        last = self.num_layers if deep or wanted else exit_at
        for index, layer in enumerate(self._layers[:last], 1):
            if index - 1 not in skip:
                hidden = self._run(layer, hidden, rotary)
            if index in wanted:
                kept[index] = hidden[rows]
            if index == exit_at:
                exit_state = self.exit_states(hidden, rows)
        assert exit_state is not None
        return States(exit_state, kept, hidden[rows] if deep else None)

    @torch.no_grad()
    def shared_states(self, token_ids: Tensor) -> Tensor:
        """States after the shared layers at every row, [batch, length, d]; no gradient."""
        hidden = self._embed(token_ids)
        rotary = self._rotary_of(hidden)
        for layer in self._layers[: self.shape.exit_layer]:
            hidden = self._run(layer, hidden, rotary)
        return hidden

    def exit_states(self, shared: Tensor, rows: Tensor) -> Tensor:
        """The shallow path from ``shared_states`` on: [n, d] at the rows wanted."""
        rotary = self._rotary_of(shared)
        for layer in self.branch[:-1]:
            shared = self._run(layer, shared, rotary)
        if not len(self.branch):
            return shared[rows]
        # Later rows look back at every row's keys, but nobody at what follows the attention of
        # the last layer: its MLP, three quarters of the work, runs where it is wanted.
        last: Any = self.branch[-1]
        attended, _ = last.self_attn(
            hidden_states=last.input_layernorm(shared),
            attention_mask=None,
            position_embeddings=rotary,
        )
        own = (shared + attended)[rows]
        result: Tensor = own + last.mlp(last.post_attention_layernorm(own))
        return result

    def deep_states(self, shared: Tensor, rows: Tensor) -> Tensor:
        """The deep path from ``shared_states`` on: [n, d] at the rows wanted, before the norm."""
        rotary = self._rotary_of(shared)
        for layer in self._layers[self.shape.exit_layer :]:
            shared = self._run(layer, shared, rotary)
        return shared[rows]

    def _rotary_of(self, hidden: Tensor) -> Any:
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        return self._rotary(hidden, position_ids=positions)

    def _run(self, layer: nn.Module, hidden: Tensor, rotary: Any) -> Tensor:
        def call(x: Tensor) -> Tensor:
            out = layer(x, attention_mask=None, position_embeddings=rotary)
            return out[0] if isinstance(out, tuple) else out

        if self.recompute and torch.is_grad_enabled():
            recomputed: Tensor = checkpoint(call, hidden, use_reentrant=False)
            return recomputed
        return call(hidden)

    def trained(self) -> dict[str, nn.Parameter]:
        """What the optimizer changes, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


@torch.no_grad()
def fit_head(model: ShallowDeep, batches: Sequence[Batch], penalty: float = 1e-3) -> None:
    """Start the head's map A at the ridge regression of the final state on the exit's: minutes.

    Both sides are scaled to root mean square 1, as the norm's output does not depend on the
    state's length; without that, the few states of huge norm would decide the fit.

    Raises:
        TrainingError: if the head has no map.
    """
    adapter = model.head.adapter
    if adapter is None:
        raise TrainingError("the head has no map to fit.")
    size = len(adapter)
    gram, cross = torch.zeros(size, size), torch.zeros(size, size)
    for batch in batches:
        rows = batch.labels != IGNORED
        states = model(batch.token_ids, rows, deep=True)
        x = F.rms_norm(states.exit.float(), (size,))
        z = F.rms_norm(states.deep.float(), (size,))
        gram += x.T @ x
        cross += x.T @ z
    gram += penalty * gram.diagonal().mean() * torch.eye(size)
    adapter.copy_(torch.linalg.solve(gram, cross).T - torch.eye(size))


def _eps(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6)))


def _with_lora(base: Any, shape: Shape) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=shape.lora_rank,
        lora_alpha=shape.lora_alpha,
        target_modules=list(LORA_TARGETS),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config)
