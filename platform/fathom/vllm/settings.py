"""Settings of vLLM replicas: what vLLM has beyond our own engine's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fathom.settings import ConfigError, check_at_least

OURS: Mapping[str, str] = {
    "model": "engine.model",
    "tokenizer": "engine.model",
    "skip_tokenizer_init": "nothing: text is made by our own tokenizer",
    "dtype": "engine.dtype",
    "max_model_len": "engine.max_model_len",
    "max_num_seqs": "engine.max_num_seqs",
    "max_num_batched_tokens": "engine.max_num_batched_tokens",
    "enable_prefix_caching": "engine.prefix_caching",
    "kv_cache_memory_bytes": "engine.kv_cache_bytes",
    "gpu_memory_utilization": "vllm.gpu_memory_utilization",
    "tensor_parallel_size": "vllm.tensor_parallel_size",
    "disable_log_stats": "nothing: /metrics needs them",
    "logprobs_mode": "nothing: logprobs are the model's own, as those of other replicas",
}
"""Engine arguments of vLLM that have a setting elsewhere -> what to say instead."""


@dataclass(frozen=True, kw_only=True)
class VllmConfig:
    """A vLLM replica, beside what ``engine`` says: model, dtype, lengths, KV cache, prefix cache.

    Attributes:
        python: interpreter of an environment that has vLLM, Fathom and the cluster's Ray, under
            this path on every node; empty takes the one that everything else runs in.
        gpus: GPUs of a replica; 0 where vLLM is built for the CPU.
        tensor_parallel_size: processes that share each layer.
        gpu_memory_utilization: share of a GPU's memory for weights and KV cache; 0 takes
            ``engine.kv_cache_bytes`` for the KV cache, as all other replicas do.
        arguments: further engine arguments of vLLM, by the names of its ``AsyncEngineArgs``
            (``enforce_eager``, ``speculative_config``).
    """

    python: str = ""
    gpus: float = 0
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.0
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def validate(self, where: str) -> None:
        """Check every field.

        Args:
            where: this section's name with a dot, for messages.

        Raises:
            ConfigError: naming the first field that cannot be used, its value and the remedy.
        """
        if self.python and not Path(self.python).is_absolute():
            raise ConfigError(
                f"{where}python must be an absolute path, the same on every node, got "
                f"{self.python!r}."
            )
        check_at_least(self, ("gpus", "gpu_memory_utilization"), 0, where)
        size = self.tensor_parallel_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigError(
                f"{where}tensor_parallel_size must be an integer of at least 1, got {size!r}."
            )
        if self.gpus and self.gpus < size and size > 1:
            raise ConfigError(
                f"{where}gpus must be at least {where}tensor_parallel_size ({size}), or 0 on a "
                f"CPU, got {self.gpus!r}."
            )
        if self.gpu_memory_utilization > 1:
            raise ConfigError(
                f"{where}gpu_memory_utilization must be a share from 0 to 1, got "
                f"{self.gpu_memory_utilization!r}."
            )
        if self.gpu_memory_utilization and not self.gpus:
            raise ConfigError(
                f"{where}gpu_memory_utilization must be 0 without {where}gpus, got "
                f"{self.gpu_memory_utilization!r}: engine.kv_cache_bytes sizes the KV cache."
            )
        if not isinstance(self.arguments, Mapping):
            raise ConfigError(f"{where}arguments must be a mapping, got {self.arguments!r}.")
        for name in self.arguments:
            if name in OURS:
                raise ConfigError(
                    f"{where}arguments must not hold {name}, got {self.arguments[name]!r}: say "
                    f"{OURS[name]}."
                )
