"""BERT (Devlin et al., 2019) as an encoder of one stage a layer; MiniLM is of its form."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fathom.models.encoders.base import Encoder, Flops, LinearHead, State
from fathom.models.errors import ModelError
from fathom.models.files import read_json
from fathom.models.weights import WeightFiles


@dataclass(frozen=True, slots=True)
class BertConfig:
    """Shape of a BERT, from its ``config.json``."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    norm_eps: float

    @staticmethod
    def from_directory(directory: Path) -> BertConfig:
        """Read ``config.json``.

        Raises:
            ModelError: if it is missing, is not of a BERT, or lacks a field.
        """
        file = directory / "config.json"
        raw = read_json(file)
        for name, wanted in (
            ("model_type", "bert"),
            ("hidden_act", "gelu"),
            ("position_embedding_type", "absolute"),
        ):
            if (found := raw.get(name, wanted)) != wanted:
                raise ModelError(f"{file}: {name} must be {wanted!r} for a classifier: {found!r}.")
        try:
            return BertConfig(
                vocab_size=int(raw["vocab_size"]),
                hidden_size=int(raw["hidden_size"]),
                num_layers=int(raw["num_hidden_layers"]),
                num_heads=int(raw["num_attention_heads"]),
                intermediate_size=int(raw["intermediate_size"]),
                max_positions=int(raw["max_position_embeddings"]),
                norm_eps=float(raw.get("layer_norm_eps", 1e-12)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{file}: damaged: {error!r}.") from error


class BertLayer(nn.Module):
    """Self-attention over all tokens and an MLP, each with a norm after its residual."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        d, inner = config.hidden_size, config.intermediate_size
        self.heads = config.num_heads
        self.qkv = nn.Linear(d, 3 * d)
        self.output = nn.Linear(d, d)
        self.attention_norm = nn.LayerNorm(d, eps=config.norm_eps)
        self.up = nn.Linear(d, inner)
        self.down = nn.Linear(inner, d)
        self.output_norm = nn.LayerNorm(d, eps=config.norm_eps)

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Run the layer.

        Args:
            hidden: [rows, tokens, d]. mask: [rows, 1, 1, tokens] bool, True for real tokens, or
                None if all are.
        """
        rows, tokens, d = hidden.shape
        qkv = self.qkv(hidden).view(rows, tokens, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mixed = mixed.transpose(1, 2).reshape(rows, tokens, d)
        hidden = self.attention_norm(hidden + self.output(mixed))
        out: Tensor = self.output_norm(hidden + self.down(F.gelu(self.up(hidden))))
        return out


class Bert(Encoder):
    """A BERT without its pooler; a head reads the mean over a row's tokens, [rows, d]."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.config = config
        self.num_stages = config.num_layers
        self.words = nn.Embedding(config.vocab_size, d)
        self.positions = nn.Embedding(config.max_positions, d)
        self.segment = nn.Parameter(torch.zeros(d))
        self.norm = nn.LayerNorm(d, eps=config.norm_eps)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_layers))

    def begin(self, inputs: Any, sizes: Tensor) -> State:
        """Embed token ids [rows, tokens] int64; see ``Encoder``."""
        tokens = int(sizes.max())
        ids: Tensor = inputs[:, :tokens]
        hidden = self.words(ids) + self.segment + self.positions.weight[:tokens]
        return State(self.norm(hidden), sizes)

    def stage(self, index: int, state: State) -> State:
        """Layer ``index``."""
        real = _mask(state)
        mask = None if bool(real.all()) else real[:, None, None, :]
        return State(self.layers[index](state.hidden, mask), state.lengths)

    def narrow(self, state: State, rows: Tensor) -> State:
        """Keep rows, and no more padding than the longest of them needs."""
        assert state.lengths is not None
        lengths = state.lengths[rows]
        return State(state.hidden[rows, : int(lengths.max())], lengths)

    def feature(self, index: int, state: State) -> Tensor:
        """Mean over the real tokens, [rows, d]: sentence-transformers' pooling for MiniLM."""
        mask = _mask(state)[..., None]
        return (state.hidden * mask).sum(1) / mask.sum(1)

    def make_head(self, index: int, classes: int, hidden: int) -> LinearHead:
        """A head that reads [rows, d]."""
        return LinearHead(self.config.hidden_size, classes, hidden)

    def stage_flops(self, index: int, sizes: NDArray[np.int64]) -> Flops:
        """One layer over rows of so many tokens; every token sees every token of its row."""
        d, inner = self.config.hidden_size, self.config.intermediate_size
        n = sizes.astype(np.float64)
        return 2.0 * (4 * d * d + 2 * d * inner) * n + 4.0 * d * n * n

    def spec(self) -> dict[str, Any]:
        """See ``Encoder``."""
        return {"kind": "bert", **dataclasses.asdict(self.config)}


def _mask(state: State) -> Tensor:
    """[rows, tokens] bool, True for real tokens."""
    assert state.lengths is not None
    places = torch.arange(state.hidden.shape[1], device=state.hidden.device)
    return places < state.lengths[:, None]


def load_bert(directory: Path) -> Bert:
    """Read a BERT from a Hugging Face directory, in float32.

    Raises:
        ModelError: for a file or tensor that is missing, damaged or of another shape.
    """
    config = BertConfig.from_directory(directory)
    files = WeightFiles(directory)
    prefix = "" if "embeddings.word_embeddings.weight" in files else "bert."
    d, inner = config.hidden_size, config.intermediate_size

    def read(name: str, *shape: int) -> Tensor:
        return files.tensor(prefix + name, shape, torch.float32)

    def read_linear(into: nn.Linear, name: str, out: int, inputs: int) -> None:
        into.weight.copy_(read(f"{name}.weight", out, inputs))
        into.bias.copy_(read(f"{name}.bias", out))

    def read_norm(into: nn.LayerNorm, name: str) -> None:
        into.weight.copy_(read(f"{name}.weight", d))
        into.bias.copy_(read(f"{name}.bias", d))

    bert = Bert(config)
    with torch.no_grad():
        table = "embeddings.{}_embeddings.weight".format
        bert.words.weight.copy_(read(table("word"), config.vocab_size, d))
        bert.positions.weight.copy_(read(table("position"), config.max_positions, d))
        bert.segment.copy_(read(table("token_type"), 2, d)[0])  # a text alone is segment 0
        read_norm(bert.norm, "embeddings.LayerNorm")
        for index, layer in enumerate(bert.layers):
            assert isinstance(layer, BertLayer)
            stem = f"encoder.layer.{index}."
            for part, name in enumerate(("query", "key", "value")):
                place = slice(part * d, (part + 1) * d)
                full = f"{stem}attention.self.{name}"
                layer.qkv.weight[place] = read(f"{full}.weight", d, d)
                layer.qkv.bias[place] = read(f"{full}.bias", d)
            read_linear(layer.output, f"{stem}attention.output.dense", d, d)
            read_norm(layer.attention_norm, f"{stem}attention.output.LayerNorm")
            read_linear(layer.up, f"{stem}intermediate.dense", inner, d)
            read_linear(layer.down, f"{stem}output.dense", d, inner)
            read_norm(layer.output_norm, f"{stem}output.LayerNorm")
    return bert
