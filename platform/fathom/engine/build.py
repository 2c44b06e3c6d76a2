"""Building an engine from its configuration: load, split at the exit layer, size, measure."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from fathom.attention.backend import SequenceRows
from fathom.attention.paged_cache import PagedKVCache
from fathom.attention.pool import KVPool
from fathom.attention.sdpa import SdpaBackend
from fathom.config import ConfigError, EngineConfig
from fathom.engine.costs import PROBE_ROWS, CostCurve, StageCosts
from fathom.engine.deep import DeepStage, LocalDeepStage
from fathom.engine.engine import Engine
from fathom.engine.info import EngineInfo
from fathom.engine.scheduler import Scheduler
from fathom.engine.shallow import ShallowStage
from fathom.engine.stage import Stage
from fathom.kvstore.keys import KeyRoot
from fathom.ledger import Ledger, ModelCosts
from fathom.models.adapters import Adapter, find_adapter
from fathom.models.decoder import Decoder
from fathom.models.heads import ExitHead, build_exit_head
from fathom.models.load import load_decoder, load_exit_layers, resolve_model, weights_digest
from fathom.models.tokenizer import IncrementalDetokenizer, Tokenizer, load_tokenizer

_PROBE_CONTEXT = 64
"""Keys that rows see while stage costs are measured."""

_PROBE_SEQUENCES = 8

_MIN_BLOCKS = 4
"""The null block, one for a copy on write, and two to work with."""


def build_engine(
    config: EngineConfig,
    wrap_deep: Callable[[LocalDeepStage], DeepStage] = lambda deep: deep,
) -> Engine:
    """Build an engine with both stages in this process.

    Args:
        wrap_deep: puts something between the engine and its deep stage.

    Raises:
        ConfigError: for a setting that cannot be used.
        ModelError: for a model or an exit head that cannot be loaded.
    """
    config.validate()
    if config.threads:
        torch.set_num_threads(config.threads)
    dtype = getattr(torch, config.dtype)
    directory = resolve_model(config.model)
    digest = weights_digest(directory)
    adapter = _adapter(config, digest)
    decoder = load_decoder(directory, dtype=dtype, device=config.device, adapter=adapter)
    # Equal weights under another shape (RoPE scaling, norm epsilon) are another model.
    shape = hashlib.sha256(repr(decoder.config).encode()).hexdigest()
    head = build_exit_head(decoder, directory, adapter, config.exit_vocab)
    tokenizer = load_tokenizer(directory)
    _return_freed_memory()
    return assemble(
        config,
        decoder,
        head,
        exit_layer=_exit_layer(config, decoder, adapter),
        adapter=adapter,
        weights_digest=f"{digest}-{shape}",
        tokenizer=tokenizer,
        wrap_deep=wrap_deep,
    )


def assemble(
    config: EngineConfig,
    decoder: Decoder,
    head: ExitHead,
    *,
    exit_layer: int,
    weights_digest: str,
    adapter: Adapter | None = None,
    tokenizer: Tokenizer | None = None,
    wrap_deep: Callable[[LocalDeepStage], DeepStage] = lambda deep: deep,
) -> Engine:
    """Put an engine together from loaded parts.

    Args:
        adapter: the one whose changes ``decoder`` and ``head`` already have; its exit layers are
            taken from it here.

    Raises:
        ConfigError: if the KV pools would be too small.
    """
    model = decoder.config
    split = ((0, exit_layer), (exit_layer, model.num_layers))
    exit_layers = load_exit_layers(decoder, adapter) if adapter else None
    num_exit_layers = len(exit_layers.layers) if exit_layers else 0
    num_blocks = _num_blocks(config, decoder, num_exit_layers)
    shallow = _stage(decoder, split[0], num_blocks, config.block_size, exit_layers)
    deep = _stage(decoder, split[1], num_blocks, config.block_size)
    max_model_len = _max_model_len(config, model.max_position, num_blocks)
    ledger = Ledger(
        ModelCosts(
            layer_params=decoder.layer_params,
            qkv_params=decoder.config.qkv_params,
            attention_width=model.num_heads * model.head_dim,
            kv_bytes=2 * model.num_kv_heads * model.head_dim * decoder.dtype.itemsize,
            exit_layer=exit_layer,
            num_layers=model.num_layers,
            exit_layers=num_exit_layers,
            exit_head_params=head.num_params,
            lm_head_params=decoder.head_params,
        )
    )
    costs = measure_stage_costs(
        decoder, head, exit_layer, config.block_size, config.max_num_batched_tokens, exit_layers
    )
    shallow_cache = PagedKVCache(num_blocks, config.block_size, shallow.pool)
    deep_stage = wrap_deep(
        LocalDeepStage(deep, PagedKVCache(num_blocks, config.block_size, deep.pool))
    )

    identity = adapter.digest if adapter else ""
    name = adapter.metadata.get("name", config.adapter) if adapter else ""
    changes_model = adapter is not None and adapter.changes_model

    # Not the adapter itself in here: its tensors have been packed into copies.
    def roots(salt: str, drafts: bool) -> tuple[KeyRoot, KeyRoot]:
        # Low-rank changes touch every block. Exit layers touch those of the shallow stage, and
        # have keys and values only where a request drafts.
        deep_adapter = identity if changes_model else ""
        shallow_adapter = identity if drafts and exit_layers else deep_adapter
        (a, b), (c, d) = split
        return (
            KeyRoot(weights_digest, shallow_adapter, a, b, config.dtype, salt),
            KeyRoot(weights_digest, deep_adapter, c, d, config.dtype, salt),
        )

    scheduler = Scheduler(
        shallow=shallow_cache,
        deep=deep_stage.cache,
        roots=roots,
        max_rows=config.max_num_batched_tokens,
        max_sequences=config.max_num_seqs,
        prefix_caching=config.prefix_caching,
        on_preempt=lambda seq: ledger.enter_preemption(seq.compute),
    )
    info = EngineInfo(
        model=config.model,
        num_layers=model.num_layers,
        adapter=name,
        exit_layer=exit_layer,
        exit_depth=exit_layer + num_exit_layers,
        exit_vocab=model.vocab_size if head.token_ids is None else len(head.token_ids),
        vocab_size=model.vocab_size,
        max_model_len=max_model_len,
        dtype=config.dtype,
        eos_token_ids=model.eos_token_ids,
        weights_digest=weights_digest,
        num_blocks=num_blocks,
        block_size=config.block_size,
    )
    return Engine(
        info=info,
        shallow=ShallowStage(shallow, shallow_cache, head, ledger),
        deep=deep_stage,
        scheduler=scheduler,
        ledger=ledger,
        stage_costs=costs,
        tokenizer=tokenizer,
        new_detokenizer=partial(IncrementalDetokenizer, tokenizer) if tokenizer else None,
    )


class Scorer(Protocol):
    """What is timed of an exit head."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See ``ExitHead.logits``."""
        ...


def measure_stage_costs(
    decoder: Decoder,
    head: Scorer,
    exit_layer: int,
    block_size: int,
    max_rows: int,
    exit_layers: Decoder | None = None,
) -> StageCosts:
    """Time both stages at a few row counts, spread over up to 8 sequences with a short context."""
    counts = tuple(rows for rows in PROBE_ROWS if rows <= max_rows)
    hidden = decoder.embed(
        torch.arange(counts[-1], device=decoder.device) % decoder.config.vocab_size
    )
    longest = _PROBE_CONTEXT + counts[-1]
    # A pool of its own: the serving pool may be smaller, and stays untouched.
    num_blocks = 1 + _PROBE_SEQUENCES * -(-longest // block_size)
    split = ((0, exit_layer), (exit_layer, decoder.config.num_layers))
    shallow = _stage(decoder, split[0], num_blocks, block_size, exit_layers)
    deep = _stage(decoder, split[1], num_blocks, block_size)
    blocks_each = num_blocks // _PROBE_SEQUENCES

    def run(stage: Stage, rows: int, *, to_exit: bool = False) -> torch.Tensor:
        sequences = min(rows, _PROBE_SEQUENCES)
        batch = []
        for index in range(sequences):
            first = 1 + index * blocks_each
            blocks = range(first, first + blocks_each)
            batch.append(SequenceRows(blocks, _PROBE_CONTEXT, rows // sequences))
        own = stage.plan(batch)
        out = stage.run(own, hidden[:rows])
        return stage.run_exit_layers(own, out) if to_exit else out

    return StageCosts(
        shallow=CostCurve.measure(
            lambda rows: _finish(head.logits(run(shallow, rows, to_exit=True))), counts
        ),
        shallow_full=CostCurve.measure(lambda rows: _finish(run(shallow, rows)), counts),
        deep=CostCurve.measure(lambda rows: _finish(decoder.logits(run(deep, rows))), counts),
    )


def _finish(result: torch.Tensor) -> None:
    """Wait for a result: a GPU answers before it is done."""
    if result.is_cuda:
        torch.cuda.synchronize(result.device)


def _stage(
    decoder: Decoder,
    layers: tuple[int, int],
    num_blocks: int,
    block_size: int,
    exit_layers: Decoder | None = None,
) -> Stage:
    """A stage with a pool of its own."""
    first, last = layers
    pool = KVPool(
        num_layers=last - first + (len(exit_layers.layers) if exit_layers else 0),
        num_kv_heads=decoder.config.num_kv_heads,
        head_dim=decoder.config.head_dim,
        num_blocks=num_blocks,
        block_size=block_size,
        dtype=decoder.dtype,
        device=decoder.device,
    )
    return Stage(decoder, first, last, pool, SdpaBackend(), exit_layers)


def _return_freed_memory() -> None:
    """Give the system back what loading has freed; glibc keeps it otherwise."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def _adapter(config: EngineConfig, digest: str) -> Adapter | None:
    adapter = find_adapter(config.adapter, config.model, digest)
    # An adapter reads the layer that it was trained on.
    if config.adapter == "auto" and adapter and config.exit_layer not in (0, adapter.exit_layer):
        return None
    return adapter


def _exit_layer(config: EngineConfig, decoder: Decoder, adapter: Adapter | None) -> int:
    num_layers = decoder.config.num_layers
    if adapter and adapter.exit_layer + adapter.exit_layers >= num_layers:
        raise ConfigError(
            f"adapter: its exit is {adapter.exit_layer + adapter.exit_layers} layers deep, the "
            f"model has {num_layers}: use the adapter that was trained for this model."
        )
    layer = config.exit_layer or (adapter.exit_layer if adapter else max(1, num_layers // 3))
    if not 1 <= layer < num_layers:
        raise ConfigError(f"exit_layer must be from 1 to {num_layers - 1}, got {layer}.")
    if adapter and adapter.exit_layer != layer:
        raise ConfigError(
            f"exit_layer must be {adapter.exit_layer}, the layer that the adapter was trained on, "
            f"got {layer}; adapter: none works at every layer."
        )
    return layer


def _num_blocks(config: EngineConfig, decoder: Decoder, num_exit_layers: int) -> int:
    """Blocks of each stage's pool, as many as the memory holds."""
    model = decoder.config
    shape = (model.num_kv_heads, model.head_dim, config.block_size, decoder.dtype)
    block_bytes = KVPool.block_bytes(model.num_layers + num_exit_layers, *shape)
    num_blocks = config.kv_cache_bytes // block_bytes
    if num_blocks < _MIN_BLOCKS:
        raise ConfigError(
            f"kv_cache_bytes must be at least {_MIN_BLOCKS * block_bytes} ({_MIN_BLOCKS} blocks "
            f"of {block_bytes} bytes), got {config.kv_cache_bytes}."
        )
    return num_blocks


def _max_model_len(config: EngineConfig, max_position: int, num_blocks: int) -> int:
    # One block is the null block, one more serves a copy on write.
    capacity = (num_blocks - 2) * config.block_size
    length = config.max_model_len or min(max_position, capacity)
    if length > max_position:
        raise ConfigError(
            f"max_model_len must be at most {max_position}, the model's longest sequence, "
            f"got {length}."
        )
    if length > capacity:
        raise ConfigError(
            f"max_model_len must be at most {capacity}, what kv_cache_bytes "
            f"({config.kv_cache_bytes}) holds, got {length}: raise kv_cache_bytes or lower it."
        )
    return length
