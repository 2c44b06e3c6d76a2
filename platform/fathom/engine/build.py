"""Building an engine from its configuration: load, split at the exit layer, size, measure."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from fathom.attention.backend import SequenceRows
from fathom.attention.paged_cache import PagedKVCache
from fathom.attention.sdpa import SdpaBackend
from fathom.config import ConfigError, EngineConfig
from fathom.engine.costs import PROBE_ROWS, CostCurve, StageCosts
from fathom.engine.deep import DeepStage, LocalDeepStage
from fathom.engine.engine import Engine, EngineInfo
from fathom.engine.scheduler import Scheduler
from fathom.engine.shallow import ShallowStage
from fathom.engine.stage import Stage
from fathom.kvstore.keys import KeyRoot
from fathom.ledger import Ledger, ModelCosts
from fathom.models.decoder import Decoder
from fathom.models.heads import (
    ExitHead,
    TrainedHead,
    build_exit_head,
    packaged_head,
    read_trained_head,
)
from fathom.models.load import load_decoder, resolve_model, weights_digest
from fathom.models.tokenizer import IncrementalDetokenizer, load_tokenizer

_PROBE_CONTEXT = 64
"""Keys that rows see while stage costs are measured."""

_PROBE_SEQUENCES = 8


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
    decoder = load_decoder(directory, dtype=dtype, device=config.device)
    trained = _trained_head(config, digest)
    head = build_exit_head(decoder, directory, trained, config.exit_vocab)
    tokenizer = load_tokenizer(directory)
    return assemble(
        config,
        decoder,
        head,
        exit_layer=_exit_layer(config, decoder, trained),
        weights_digest=digest,
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
    tokenizer: object | None = None,
    wrap_deep: Callable[[LocalDeepStage], DeepStage] = lambda deep: deep,
) -> Engine:
    """Put an engine together from loaded parts.

    Raises:
        ConfigError: if the KV pools would be too small.
    """
    model = decoder.config
    split = {"first": (0, exit_layer), "last": (exit_layer, model.num_layers)}
    stages, num_blocks = _stages(config, decoder, list(split.values()))
    shallow, deep = stages
    max_model_len = _max_model_len(config, model.max_position, num_blocks)
    ledger = Ledger(
        ModelCosts(
            layer_params=decoder.layer_params,
            attention_width=model.num_heads * model.head_dim,
            kv_bytes=2 * model.num_kv_heads * model.head_dim * decoder.dtype.itemsize,
            exit_layer=exit_layer,
            num_layers=model.num_layers,
            exit_head_params=head.num_params,
            lm_head_params=decoder.head_params,
        )
    )
    costs = measure_stage_costs(shallow, deep, head, min(config.max_num_batched_tokens, 64))
    deep_stage = wrap_deep(LocalDeepStage(deep))

    def roots(salt: str) -> tuple[KeyRoot, KeyRoot]:
        shallow_root, deep_root = (
            KeyRoot(weights_digest, "", first, last, config.dtype, salt)
            for first, last in split.values()
        )
        return shallow_root, deep_root

    scheduler = Scheduler(
        shallow=shallow.cache,
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
        exit_layer=exit_layer,
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
        shallow=ShallowStage(shallow, head, ledger),
        deep=deep_stage,
        scheduler=scheduler,
        ledger=ledger,
        stage_costs=costs,
        tokenizer=tokenizer,
        new_detokenizer=partial(IncrementalDetokenizer, tokenizer) if tokenizer else None,
    )


def measure_stage_costs(
    shallow: Stage, deep: Stage, head: ExitHead, max_rows: int
) -> StageCosts:
    """Time both stages at a few row counts, spread over up to 8 sequences with a short context."""
    decoder = shallow.decoder
    counts = tuple(rows for rows in PROBE_ROWS if rows <= max_rows)
    hidden = decoder.embed(torch.arange(counts[-1]) % decoder.config.vocab_size)

    def run(stage: Stage, rows: int) -> torch.Tensor:
        sequences = min(rows, _PROBE_SEQUENCES)
        per_sequence = rows // sequences
        batch = []
        for seq_id in range(-1, -1 - sequences, -1):
            stage.cache.truncate(seq_id, _PROBE_CONTEXT)
            stage.cache.grow(seq_id, _PROBE_CONTEXT + per_sequence)
            batch.append(SequenceRows(seq_id, _PROBE_CONTEXT, per_sequence))
        return stage.run(batch, hidden[:rows])

    # Requests count from 0, so negative ids are free; the context's blocks are shared.
    probes = range(-1, -1 - _PROBE_SEQUENCES, -1)
    for stage in (shallow, deep):
        stage.cache.open(probes[0])
        stage.cache.grow(probes[0], _PROBE_CONTEXT)
        for seq_id in probes[1:]:
            stage.cache.fork(probes[0], seq_id, _PROBE_CONTEXT)
    try:
        return StageCosts(
            shallow=CostCurve.measure(lambda rows: head.logits(run(shallow, rows)), counts),
            shallow_full=CostCurve.measure(lambda rows: run(shallow, rows), counts),
            deep=CostCurve.measure(lambda rows: decoder.logits(run(deep, rows)), counts),
        )
    finally:
        for stage in (shallow, deep):
            for seq_id in probes:
                stage.cache.free(seq_id)


def _trained_head(config: EngineConfig, digest: str) -> TrainedHead | None:
    if config.exit_head == "shared":
        return None
    if config.exit_head != "auto":
        return read_trained_head(config.exit_head)[0]
    path = packaged_head(digest)
    head = read_trained_head(path)[0] if path else None
    # A head reads the layer that it was trained on.
    return head if head and config.exit_layer in (0, head.exit_layer) else None


def _exit_layer(config: EngineConfig, decoder: Decoder, trained: TrainedHead | None) -> int:
    num_layers = decoder.config.num_layers
    layer = config.exit_layer or (trained.exit_layer if trained else max(1, num_layers // 3))
    if not 1 <= layer < num_layers:
        raise ConfigError(f"exit_layer must be from 1 to {num_layers - 1}, got {layer}.")
    if trained and trained.exit_layer != layer:
        raise ConfigError(
            f"exit_layer must be {trained.exit_layer}, the layer that the exit head was trained "
            f"on, got {layer}; exit_head: shared works at every layer."
        )
    return layer


def _stages(
    config: EngineConfig, decoder: Decoder, ranges: list[tuple[int, int]]
) -> tuple[list[Stage], int]:
    """Both stages, with pools of as many blocks as the memory holds."""
    model = decoder.config
    shape = (model.num_kv_heads, model.head_dim, config.block_size, decoder.dtype)
    block_bytes = PagedKVCache.block_bytes(model.num_layers, *shape)
    num_blocks = config.kv_cache_bytes // block_bytes
    probe_rows = -(-PROBE_ROWS[-1] // _PROBE_SEQUENCES)
    blocks_of = -(-(_PROBE_CONTEXT + probe_rows) // config.block_size)
    needed = 1 + _PROBE_SEQUENCES * blocks_of  # shared where block_size divides the context
    if num_blocks < needed:
        raise ConfigError(
            f"kv_cache_bytes must be at least {needed * block_bytes} ({needed} blocks of "
            f"{block_bytes} bytes), got {config.kv_cache_bytes}."
        )
    backend = SdpaBackend()
    stages = []
    for first, last in ranges:
        cache = PagedKVCache(
            num_layers=last - first,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            num_blocks=num_blocks,
            block_size=config.block_size,
            dtype=decoder.dtype,
            device=decoder.device,
        )
        stages.append(Stage(decoder, first, last, cache, backend))
    return stages, num_blocks


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
