"""Building an engine from its configuration: load, split at the exit layer, size, measure."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from fathom.attention.choice import name_of
from fathom.attention.paged_cache import PagedKVCache
from fathom.config import EngineConfig
from fathom.engine.costs import StageCosts
from fathom.engine.deep import DeepStage, LocalDeepStage
from fathom.engine.engine import Engine
from fathom.engine.measure import Running, measure_stage_costs, new_stage
from fathom.engine.plan import SplitPlan, exit_layer_of, model_digest
from fathom.engine.prefixes import SharedPrefixes
from fathom.engine.scheduler import Scheduler
from fathom.engine.shallow import ShallowStage
from fathom.engine.shared import SharedBlocks
from fathom.engine.stage import Stage
from fathom.exits.live import LivePolicies
from fathom.exits.meta import MetaClassifier
from fathom.kvstore.store import KVStore
from fathom.ledger import Ledger
from fathom.models.adapters import Adapter, find_adapter
from fathom.models.config import ModelConfig
from fathom.models.decoder import Decoder
from fathom.models.errors import ModelError
from fathom.models.heads import ExitHead, build_exit_head
from fathom.models.load import load_decoder, load_exit_layers, resolve_model, weights_digest
from fathom.models.tokenizer import (
    Backend,
    IncrementalDetokenizer,
    load_backend,
    load_tokenizer,
)


def build_engine(
    config: EngineConfig,
    wrap_deep: Callable[[LocalDeepStage], DeepStage] = lambda deep: deep,
    store: KVStore | None = None,
    *,
    encodes: bool = True,
) -> Engine:
    """Build an engine with both stages in this process.

    Args:
        wrap_deep: puts something between the engine and its deep stage.
        store: of KV blocks, shared with other replicas.
        encodes: whether it has a ``tokenizer``; a server's ingress has one of its own.

    Raises:
        ConfigError: for a setting that cannot be used.
        ModelError: for a model or an exit head that cannot be loaded.
    """
    prepare(config)
    directory = resolve_model(config.model)
    digest = weights_digest(directory)
    adapter = adapter_of(config, digest)
    model = ModelConfig.from_directory(directory)
    exit_layer = exit_layer_of(config, model, adapter)
    decoder = load_decoder(
        directory,
        dtype=getattr(torch, config.dtype),
        device=config.device,
        adapter=adapter,
        layer_bits=config.bits.of_layers(exit_layer, model.num_layers),
    )
    head = build_exit_head(
        decoder, directory, adapter, config.exit_vocab, quantized=bool(config.bits.shallow)
    )
    tokenizer = load_tokenizer(directory) if encodes else None
    backend = load_backend(directory) if tokenizer is None else tokenizer.backend
    return_freed_memory()
    engine = assemble(
        config,
        decoder,
        head,
        exit_layer=exit_layer,
        adapter=adapter,
        weights_digest=model_digest(digest, model, config.bits),
        backend=backend,
        wrap_deep=wrap_deep,
        store=store,
    )
    engine.tokenizer = tokenizer
    return engine


def assemble(
    config: EngineConfig,
    decoder: Decoder,
    head: ExitHead,
    *,
    exit_layer: int,
    weights_digest: str,
    adapter: Adapter | None = None,
    backend: Backend | None = None,
    wrap_deep: Callable[[LocalDeepStage], DeepStage] = lambda deep: deep,
    store: KVStore | None = None,
) -> Engine:
    """Put an engine together from loaded parts.

    Args:
        adapter: the one whose changes ``decoder`` and ``head`` already have; its exit layers are
            taken from it here.
        backend: turns ids into text; None where only ids matter.

    Raises:
        ConfigError: if the KV pools would be too small.
    """
    plan = SplitPlan.make(
        config,
        decoder.config,
        exit_layer=exit_layer,
        weights_digest=weights_digest,
        adapter=adapter,
    )
    exit_layers = load_exit_layers(decoder, adapter, config.bits.shallow) if adapter else None
    size, num_blocks = config.block_size, plan.num_blocks
    runs = Running.of(config)
    shallow = new_stage(decoder, (0, exit_layer), num_blocks, size, exit_layers, runs)
    layers = (exit_layer, decoder.config.num_layers)
    deep = new_stage(decoder, layers, num_blocks, size, runs=runs)
    costs = measure_stage_costs(
        decoder, head, exit_layer, size, config.max_num_batched_tokens, exit_layers, runs
    )
    shared = SharedBlocks(store, deep.pool) if store is not None else None
    local = LocalDeepStage(deep, PagedKVCache(num_blocks, size, deep.pool), shared)
    return engine_over(plan, shallow, head, wrap_deep(local), costs, backend, store)


def engine_over(
    plan: SplitPlan,
    shallow: Stage,
    head: ExitHead,
    deep: DeepStage,
    costs: StageCosts,
    backend: Backend | None,
    store: KVStore | None,
) -> Engine:
    """An engine over its shallow stage and a deep one, wherever that is."""
    config = plan.config
    ledger = Ledger(plan.costs(head.num_params))
    meta = meta_of(plan)
    policies = LivePolicies(ledger.costs.exit_cost, has_meta=meta is not None)
    cache = PagedKVCache(plan.num_blocks, config.block_size, shallow.pool)
    scheduler = Scheduler(
        shallow=cache,
        deep=deep.cache,
        roots=plan.roots,
        max_rows=config.max_num_batched_tokens,
        max_sequences=config.max_num_seqs,
        prefix_caching=config.prefix_caching,
        on_preempt=lambda seq: ledger.enter_preemption(seq.compute),
    )
    if store is not None and config.prefix_caching:
        width = plan.model.hidden_size
        scheduler.shared = SharedPrefixes(
            SharedBlocks(store, shallow.pool, width),
            cache,
            deep,
            width=width,
            dtype=plan.dtype,
            device=config.device,
        )
    exit_vocab = plan.model.vocab_size if head.token_ids is None else len(head.token_ids)
    return Engine(
        info=plan.info(exit_vocab, name_of(shallow.backend)),
        shallow=ShallowStage(shallow, cache, head, ledger, policies, meta),
        policies=policies,
        deep=deep,
        scheduler=scheduler,
        ledger=ledger,
        stage_costs=costs,
        pause_drafting=config.pause_drafting,
        flush_rule=config.flush_rule,
        new_detokenizer=None if backend is None else partial(IncrementalDetokenizer, backend),
    )


def prepare(config: EngineConfig) -> None:
    """Check the settings and set this process's threads.

    Raises:
        ConfigError: for a setting that cannot be used.
    """
    config.validate()
    if config.threads:
        torch.set_num_threads(config.threads)


def adapter_of(config: EngineConfig, digest: str) -> Adapter | None:
    """The adapter that the settings name, if any; ``digest`` is that of the weights."""
    adapter = find_adapter(config.adapter, config.model, digest)
    # An adapter reads the layer that it was trained on.
    if config.adapter == "auto" and adapter and config.exit_layer not in (0, adapter.exit_layer):
        return None
    return adapter


def meta_of(plan: SplitPlan) -> MetaClassifier | None:
    """The classifier that the settings name, if any.

    Raises:
        ModelError: for a file that cannot be read, or was made for another model, width or adapter.
    """
    config = plan.config
    if not config.meta:
        return None
    meta = MetaClassifier.load(Path(config.meta), plan.weights_digest)
    made_for = meta.metadata.get("adapter_digest", plan.adapter_digest)
    if made_for != plan.adapter_digest:
        raise ModelError(
            f"{config.meta}: the meta classifier reads the exit of adapter {made_for or 'none'}, "
            f"this one is {plan.adapter_digest or 'none'}: train one for this adapter."
        )
    width = plan.model.hidden_size
    if meta.size != width:
        raise ModelError(
            f"{config.meta}: the meta classifier reads states of width {meta.size}, this model's "
            f"have {width}: train one for this model."
        )
    return meta


def return_freed_memory() -> None:
    """Give the system back what loading has freed; glibc keeps it otherwise."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
