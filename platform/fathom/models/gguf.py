"""Converting a GGUF file into a Hugging Face directory: dequantized, float32, ready to load."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

from fathom.models.cache import build_directory, cache_root
from fathom.models.errors import ModelError
from fathom.models.files import INDEX_FILE, SINGLE_FILE
from fathom.models.hf_config import FAMILIES

# llama.cpp calls Mistral "llama" too: the two compute the same.
_FAMILY_OF = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
_SHARD_BYTES = 1 << 30  # bounds the memory that a conversion needs


def converted_gguf(file: Path) -> Path:
    """The cache's converted copy of a GGUF file, made on first use.

    Raises:
        ModelError: as ``convert_gguf`` does.
    """
    try:
        stat = file.stat()
    except OSError as error:
        raise ModelError(f"{file}: cannot read: {error.strerror}.") from error
    identity = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    final = cache_root() / "gguf" / f"{file.stem}-{key}"
    return build_directory(final, lambda directory: convert_gguf(file, directory))


def convert_gguf(file: Path, directory: Path, *, progress: bool = True) -> None:
    """Write a GGUF model as ``config.json``, float32 safetensors and tokenizer files.

    The weights are what transformers' ``from_pretrained(gguf_file=...)`` gives in float32.

    Args:
        directory: an existing, empty directory.
        progress: show a progress bar on standard error.

    Raises:
        ModelError: if the file is missing or damaged, or its architecture, a tensor in it or a
            setting is not supported.
    """
    reader = open_gguf(file)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    architecture = str(metadata.get("general.architecture"))
    if architecture not in _FAMILY_OF:
        raise ModelError(
            f"{file}: unsupported GGUF architecture {architecture!r}; supported: "
            f"{', '.join(_FAMILY_OF)}."
        )
    if int(metadata.get("split.count") or 1) > 1:
        raise ModelError(f"{file}: one part of a split GGUF; merge the parts with gguf-split.")
    try:
        _write_config(metadata, architecture, reader, directory)
        heads = {
            "attn_q": int(metadata[f"{architecture}.attention.head_count"]),
            "attn_k": int(_kv_heads(metadata, architecture)),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{file}: damaged or unsupported GGUF metadata: {error}.") from error
    shards = _ShardWriter(directory)
    for tensor in tqdm(reader.tensors, f"Converting {file.name}", disable=not progress):
        if tensor.name == _ROPE_FACTORS:
            continue  # went into config.json
        name = _tensor_name(tensor.name, file)
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise ModelError(
                f"{file}: tensor {tensor.name!r}: cannot dequantize "
                f"{tensor.tensor_type.name}: {error}."
            ) from error
        part = tensor.name.split(".")[-2]
        if architecture == "llama" and part in heads:
            values = _unpermute(values, heads[part])
        shards.add(name, torch.from_numpy(np.array(values, dtype=np.float32)))
    shards.close()
    _write_tokenizer(file, directory)


def open_gguf(file: Path) -> GGUFReader:
    """Open a GGUF file.

    Raises:
        ModelError: if it is missing or damaged.
    """
    try:
        return GGUFReader(file)
    # A cut or damaged file surfaces as any of these, from numpy reading past the end.
    except (OSError, ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ModelError(f"{file}: missing or damaged GGUF file: {error}.") from error


def _tensor_name(name: str, file: Path) -> str:
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    raise ModelError(f"{file}: unsupported tensor {name!r}: not part of a Llama or Qwen decoder.")


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's reordering of Q and K rows, from interleaved to half-and-half rotation."""
    pairs = weight.shape[0] // heads // 2
    return weight.reshape(heads, pairs, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _kv_heads(metadata: dict[str, Any], architecture: str) -> Any:
    queries = metadata[f"{architecture}.attention.head_count"]
    return metadata.get(f"{architecture}.attention.head_count_kv", queries)


def _write_config(
    metadata: dict[str, Any], architecture: str, reader: GGUFReader, directory: Path
) -> None:
    def setting(key: str, default: Any = None) -> Any:
        return metadata.get(f"{architecture}.{key}", default)

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    width, heads = int(setting("embedding_length")), int(setting("attention.head_count"))
    head_dim = int(setting("attention.key_length", width // heads))
    if int(setting("rope.dimension_count", head_dim)) != head_dim:
        raise ValueError("rotation of only a part of each head is not supported")
    length = int(setting("context_length"))
    window = int(setting("attention.sliding_window", 0) or 0)
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    # Chat models may end a turn with another token than the one that ends a document.
    ends = [end for end in (eos, metadata.get("tokenizer.ggml.eot_token_id")) if end is not None]
    family = _FAMILY_OF[architecture]
    config = FAMILIES[family](
        architectures=[family],
        vocab_size=int(tensors["token_embd.weight"].shape[1]),  # GGUF shapes run inner to outer
        hidden_size=width,
        intermediate_size=int(setting("feed_forward_length")),
        num_hidden_layers=int(setting("block_count")),
        num_attention_heads=heads,
        num_key_value_heads=int(_kv_heads(metadata, architecture)),
        head_dim=head_dim,
        # A window in the file has the meaning it has in ModelConfig: exact up to that length.
        max_position_embeddings=min(length, window) if window else length,
        rms_norm_eps=float(setting("attention.layer_norm_rms_epsilon")),
        rope_parameters=_rope_parameters(setting, tensors, length),
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=list(dict.fromkeys(ends)) if len(set(ends)) > 1 else eos,
        dtype="float32",
    )
    config.save_pretrained(directory)


def _rope_parameters(setting: Any, tensors: dict[str, Any], length: int) -> dict[str, Any]:
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(setting("rope.freq_base", 10000.0)),
    }
    kind = setting("rope.scaling.type", "none")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": float(setting("rope.scaling.factor"))}
    elif kind != "none":
        raise ValueError(f"rope scaling {kind!r} is not supported; supported: linear, yarn")
    if kind == "yarn":
        original = int(setting("rope.scaling.original_context_length"))
        rope["original_max_position_embeddings"] = original
    if _ROPE_FACTORS in tensors:
        # Llama 3.1 and later: the file holds llama3 scaling as one divisor a frequency, which is
        # what LongRoPE's config can say. (transformers' GGUF reader drops this tensor.)
        factors = tensors[_ROPE_FACTORS].data.astype(np.float32).tolist()
        rope |= {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": length,
        }
    return rope


def _write_tokenizer(file: Path, directory: Path) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent.resolve()), gguf_file=file.name)
        tokenizer.save_pretrained(directory)
    except Exception as error:  # whatever a tokenizer kind unknown to transformers runs into
        raise ModelError(f"{file}: cannot read the tokenizer in it: {error}.") from error


class _ShardWriter:
    """Writes tensors to safetensors files of bounded size, and the index of several."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pending: dict[str, Tensor] = {}
        self.pending_bytes = 0
        self.total_bytes = 0
        self.shard_of: dict[str, str] = {}
        self.shards = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self.pending and self.pending_bytes + tensor.nbytes > _SHARD_BYTES:
            self._flush()
        self.pending[name] = tensor
        self.pending_bytes += tensor.nbytes

    def close(self) -> None:
        if not self.shards:
            self._save(SINGLE_FILE)
            return
        self._flush()
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": self.shard_of}
        (self.directory / INDEX_FILE).write_text(json.dumps(index, indent=2))

    def _flush(self) -> None:
        self.shards += 1
        shard = f"model-{self.shards:05d}.safetensors"
        self._save(shard)
        self.shard_of |= dict.fromkeys(self.pending, shard)
        self.total_bytes += self.pending_bytes
        self.pending, self.pending_bytes = {}, 0

    def _save(self, name: str) -> None:
        save_file(self.pending, self.directory / name, metadata={"format": "pt"})
        # safetensors makes files that only their owner reads; a cache baked into a container
        # image is read by another user.
        (self.directory / name).chmod(0o644)
