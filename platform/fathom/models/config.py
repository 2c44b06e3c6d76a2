"""The shape of a decoder, read from a Hugging Face model directory's ``config.json``."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fathom.models.cache import content_key, remembered
from fathom.models.errors import ModelError

__all__ = ["ModelConfig", "ModelError"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder-only transformer.

    Attributes:
        architecture: the Hugging Face class name, ``LlamaForCausalLM`` and so on.
        hidden_size: d, the width of the residual stream. intermediate_size: that of the MLP.
        head_dim: D, of queries, keys and values; not always d / num_heads.
        rms_norm_eps: added to the mean square in every RMSNorm.
        rope_inv_freq: [D / 2] angular frequencies in radians a position, exact in float32.
        rope_attention_scaling: factor on cos and sin (1 unless YaRN or LongRoPE).
        tie_word_embeddings: the LM head is the embedding table.
        qkv_bias, output_bias, mlp_bias: which linears have a bias; ``output`` is attention's.
        qk_norm: queries and keys pass an RMSNorm over head_dim before the rotation.
        max_position: longest sequence in tokens for which the decoder is exact.
        sliding_window: the window that capped ``max_position``, or None.
        eos_token_ids: every id that ends a sequence. bos_token_id: the one that starts it.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_inv_freq: tuple[float, ...]
    rope_attention_scaling: float
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    max_position: int
    sliding_window: int | None
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @property
    def layer_params(self) -> int:
        """Weights that one row is multiplied with in one layer (norms and biases left out)."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.hidden_size * (attention + 3 * self.intermediate_size)

    @property
    def qkv_params(self) -> int:
        """Weights of a layer's query, key and value projections."""
        return self.hidden_size * (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def head_params(self) -> int:
        """Weights that one row is multiplied with in the LM head."""
        return self.vocab_size * self.hidden_size

    @classmethod
    def from_directory(cls, path: Path) -> ModelConfig:
        """Read ``config.json``, and ``generation_config.json`` where there is one.

        transformers reads them, which takes seconds to import: what it made of files like these is
        remembered in the cache, and a replica that starts again does without it.

        Raises:
            ModelError: for a missing or damaged file, an architecture that is not supported, a
                quantized checkpoint, or a setting that the decoder does not implement.
        """
        here = Path(__file__)
        sources = [here, here.with_name("hf_config.py")]
        settings = [path / name for name in ("config.json", "generation_config.json")]
        try:
            key = content_key(
                [*sources, *(file for file in settings if file.exists())],
                importlib.metadata.version("transformers"),
            )
        except OSError as error:
            raise ModelError(f"{error.filename}: cannot read: {error.strerror}.") from error

        def read() -> str:
            from fathom.models.hf_config import read_config

            return json.dumps(asdict(read_config(path)))

        found = json.loads(remembered("configs", key, read))
        for name in ("rope_inv_freq", "eos_token_ids"):
            found[name] = tuple(found[name])
        return cls(**found)
