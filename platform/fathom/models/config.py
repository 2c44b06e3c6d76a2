"""The shape of a decoder, read from a Hugging Face model directory's ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from fathom.models.errors import ModelError
from fathom.models.files import read_json
from fathom.models.rope import RopeError, exact_length, rope_frequencies

__all__ = ["FAMILIES", "ModelConfig", "ModelError"]

# transformers' own config classes fill in each family's defaults and migrate old spellings.
FAMILIES: dict[str, type[PreTrainedConfig]] = {
    "LlamaForCausalLM": LlamaConfig,
    "MistralForCausalLM": MistralConfig,
    "Qwen2ForCausalLM": Qwen2Config,
    "Qwen3ForCausalLM": Qwen3Config,
}


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

        Raises:
            ModelError: for a missing or damaged file, an architecture that is not supported, a
                quantized checkpoint, or a setting that the decoder does not implement.
        """
        file = path / "config.json"
        raw = read_json(file)
        architecture = _architecture(raw, file)
        if raw.get("quantization_config"):
            method = raw["quantization_config"].get("quant_method", "unknown")
            raise ModelError(
                f"{file}: quantized checkpoint (quant_method {method!r}); supported are float32, "
                "bfloat16 and float16 safetensors, and GGUF files, which are dequantized."
            )
        try:
            hf = FAMILIES[architecture].from_dict(raw)
            inv_freq, scaling = rope_frequencies(hf)
            rope_limit = exact_length(hf)
        except RopeError as error:
            raise ModelError(f"{file}: {error}") from error
        except (StrictDataclassError, TypeError, ValueError, KeyError) as error:
            raise ModelError(f"{file}: invalid {architecture} configuration: {error}") from error
        _check(hf, file)
        window = _sliding_window(hf, file)
        # Attention here is always over the whole sequence. That equals sliding-window attention
        # as long as no position is more than the window behind, so within the window the model
        # is exact, and beyond it we do not serve rather than serve something else.
        max_position = min(rope_limit, window or rope_limit)
        heads = hf.num_attention_heads
        qwen2 = architecture == "Qwen2ForCausalLM"
        attention_bias = bool(getattr(hf, "attention_bias", False))
        return cls(
            architecture=architecture,
            vocab_size=hf.vocab_size,
            hidden_size=hf.hidden_size,
            intermediate_size=hf.intermediate_size,
            num_layers=hf.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=hf.num_key_value_heads,
            head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // heads,
            rms_norm_eps=hf.rms_norm_eps,
            rope_inv_freq=inv_freq,
            rope_attention_scaling=scaling,
            tie_word_embeddings=bool(hf.tie_word_embeddings),
            qkv_bias=attention_bias or qwen2,
            output_bias=attention_bias,
            mlp_bias=bool(getattr(hf, "mlp_bias", False)),
            qk_norm=architecture == "Qwen3ForCausalLM",
            max_position=max_position,
            sliding_window=window,
            eos_token_ids=_eos_token_ids(hf, path / "generation_config.json"),
            bos_token_id=hf.bos_token_id,
        )


def _architecture(raw: dict[str, Any], file: Path) -> str:
    by_model_type = {kind.model_type: name for name, kind in FAMILIES.items()}
    found = (raw.get("architectures") or [None])[0] or by_model_type.get(raw.get("model_type", ""))
    if found not in FAMILIES:
        raise ModelError(
            f"{file}: unsupported architecture {found or raw.get('model_type')!r}; "
            f"supported: {', '.join(FAMILIES)}."
        )
    return str(found)


def _check(hf: Any, file: Path) -> None:
    if hf.hidden_act != "silu":
        raise ModelError(f"{file}: unsupported hidden_act {hf.hidden_act!r}; supported: 'silu'.")
    if hf.num_key_value_heads < 1 or hf.num_attention_heads % hf.num_key_value_heads:
        raise ModelError(
            f"{file}: num_attention_heads ({hf.num_attention_heads}) must be a multiple of "
            f"num_key_value_heads ({hf.num_key_value_heads})."
        )


def _sliding_window(hf: Any, file: Path) -> int | None:
    window = getattr(hf, "sliding_window", None)
    # Mistral has no layer types: a window, if set, holds in every layer.
    kinds = set(getattr(hf, "layer_types", None) or (["sliding_attention"] if window else []))
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ModelError(
            f"{file}: unsupported layer_types {', '.join(sorted(unknown))}; supported: "
            "full_attention, sliding_attention."
        )
    return window if "sliding_attention" in kinds else None


def _eos_token_ids(hf: Any, generation_file: Path) -> tuple[int, ...]:
    # Chat models often name their end-of-turn id only in generation_config.json.
    values = [hf.eos_token_id]
    if generation_file.exists():
        values.append(read_json(generation_file).get("eos_token_id"))
    ids: list[int] = []
    for value in values:
        for token_id in value if isinstance(value, list) else [value]:
            if token_id is not None and token_id not in ids:
                ids.append(int(token_id))
    return tuple(ids)
