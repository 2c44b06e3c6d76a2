"""Reading ``config.json`` with transformers' own config classes; slow to import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from fathom.models.config import ModelConfig
from fathom.models.errors import ModelError
from fathom.models.files import read_json

# transformers' own config classes fill in each family's defaults and migrate old spellings.
FAMILIES: dict[str, type[PreTrainedConfig]] = {
    "LlamaForCausalLM": LlamaConfig,
    "MistralForCausalLM": MistralConfig,
    "Qwen2ForCausalLM": Qwen2Config,
    "Qwen3ForCausalLM": Qwen3Config,
}

SUPPORTED_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


class _RopeError(ValueError):
    """A kind of rotary embedding that the decoder does not implement."""


def read_config(path: Path) -> ModelConfig:
    """See ``ModelConfig.from_directory``."""
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
        inv_freq, scaling = _rope_frequencies(hf)
        rope_limit = _exact_length(hf)
    except _RopeError as error:
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
    return ModelConfig(
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


def _rope_frequencies(hf_config: Any) -> tuple[tuple[float, ...], float]:
    """Compute the rotary frequencies of a model with transformers' own functions.

    Args:
        hf_config: a transformers configuration with ``rope_parameters``.

    Returns:
        [head_dim / 2] inverse frequencies in radians a position (float32 values), and the factor
        on cos and sin. They hold for sequences of up to ``_exact_length`` tokens.

    Raises:
        _RopeError: for an unknown ``rope_type``, or a rotation of only a part of each head.
    """
    hf_config.standardize_rope_params()
    parameters = hf_config.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind not in SUPPORTED_ROPE_TYPES:
        raise _RopeError(
            f"unsupported rope_type {kind!r}; supported: {', '.join(SUPPORTED_ROPE_TYPES)}."
        )
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise _RopeError("partial_rotary_factor below 1 is not supported.")
    if kind == "default":  # transformers leaves this one to each model's own class
        heads = hf_config.num_attention_heads
        dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
        exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        return tuple((1.0 / parameters["rope_theta"] ** exponent).tolist()), 1.0
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))
    return tuple(inv_freq.float().tolist()), float(scaling)


def _exact_length(hf_config: Any) -> int:
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
