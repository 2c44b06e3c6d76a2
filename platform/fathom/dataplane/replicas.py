"""The two halves of an engine as processes of their own: each loads its layers alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fathom.config import EngineConfig
from fathom.dataplane.client import DEADLINE_S, GIVE_UP_S, RemoteDeepStage
from fathom.dataplane.protocol import VERSION, Hello
from fathom.dataplane.server import DeepServer
from fathom.dataplane.tls import Tls
from fathom.dataplane.worker import DeepWorker
from fathom.engine.build import adapter_of, engine_over, prepare, return_freed_memory
from fathom.engine.costs import CostCurve, StageCosts
from fathom.engine.engine import Engine
from fathom.engine.measure import Running, measure_deep, measure_shallow, new_stage
from fathom.engine.plan import SplitPlan, exit_layer_of, model_digest
from fathom.engine.shared import SharedBlocks
from fathom.kvstore.store import KVStore
from fathom.models.adapters import Adapter
from fathom.models.config import ModelConfig
from fathom.models.heads import build_exit_head, needs_lm_head
from fathom.models.load import load_decoder, load_exit_layers, resolve_model, weights_digest
from fathom.models.tokenizer import load_backend

_SWITCH_S = 0.0005
"""Python lets a thread run for 5 ms before another that waits; a flush is handed on four times."""


class DeepDead(RuntimeError):
    """A deep stage whose thread has ended; the process should be replaced."""


class DeepHost:
    """A deep stage behind its exchange; see ``start_deep``.

    Attributes:
        address: for shallow replicas. num_weights: parameters that are held.
    """

    def __init__(
        self, worker: DeepWorker, server: DeepServer, shared: SharedBlocks | None, lease: int
    ) -> None:
        self.address = server.address
        self.num_weights = worker.stage.decoder.num_weights
        self._worker = worker
        self._server = server
        self._shared = shared
        self._lease = lease

    @property
    def free_leases(self) -> int:
        """Shallow replicas that can still be taken."""
        return self._server.free_blocks // self._lease

    def stats(self) -> dict[str, float]:
        """Figures of this moment and totals since the start; names as in the metrics."""
        shared = self._shared
        return {
            **self._worker.stats(),
            "free_leases": self.free_leases,
            "kv_store_blocks_loaded": shared.loaded if shared else 0,
            "kv_store_blocks_published": shared.published if shared else 0,
        }

    def check_health(self) -> None:
        """Check that flushes are answered.

        Raises:
            DeepDead: if they are not.
        """
        if not self._worker.is_alive:
            raise DeepDead("the deep stage's thread has ended")

    def close(self) -> None:
        """Stop listening; exchanges under way break."""
        self._server.close()
        self._worker.close()
        if self._shared is not None:
            self._shared.close()


def start_deep(
    config: EngineConfig,
    *,
    leases: int,
    token: str,
    host: str = "127.0.0.1",
    port: int = 0,
    tls: Tls | None = None,
    store: KVStore | None = None,
) -> DeepHost:
    """Load the layers [k, L) and the LM head, and serve their flushes.

    Args:
        config: the same as the shallow replicas'.
        leases: shallow replicas that can be taken at once. The pool has the deep part of
            ``kv_cache_bytes`` for each.
        token: that clients must show. host, port, tls: see ``DeepServer``.
        store: of KV blocks, shared with other replicas.

    Raises:
        ConfigError: for a setting that cannot be used.
        ModelError: for a model that cannot be loaded.
    """
    prepare(config)
    sys.setswitchinterval(_SWITCH_S)
    directory, plan, adapter = _plan(config)
    layers = (plan.exit_layer, plan.model.num_layers)
    decoder = load_decoder(
        directory,
        dtype=plan.dtype,
        device=config.device,
        layers=layers,
        embedding=False,
        adapter=adapter,
        layer_bits=plan.layer_bits,
    )
    return_freed_memory()
    lease = plan.num_blocks - 1
    rows = config.max_num_batched_tokens
    runs = Running.of(config)
    costs = measure_deep(decoder, plan.exit_layer, config.block_size, rows, runs)
    stage = new_stage(decoder, layers, leases * lease + 1, config.block_size, runs=runs)
    worker = DeepWorker(stage, rows)
    shared = SharedBlocks(store, stage.pool) if store is not None else None
    server = DeepServer(
        worker,
        hello_of(plan, leases * lease),
        token=token,
        host=host,
        port=port,
        tls=tls,
        costs=costs.points,
        shared=shared,
    )
    return DeepHost(worker, server, shared, lease)


def build_shallow(
    config: EngineConfig,
    peers: Callable[[], Sequence[str]],
    *,
    token: str,
    tls: Tls | None = None,
    deadline_s: float = DEADLINE_S,
    give_up_s: float = GIVE_UP_S,
    wait_s: float = 0.0,
    on_lost: Callable[[str], None] = lambda address: None,
    store: KVStore | None = None,
) -> Engine:
    """An engine with the layers [0, k) and the exit head, its deep stage behind an exchange.

    Args:
        config: the same as the deep replicas'.
        peers: gives the addresses of the deep replicas that there are now, the preferred first.
        token, tls, deadline_s, give_up_s, on_lost: see ``RemoteDeepStage``.
        wait_s: how long a first peer is waited for.
        store: of KV blocks, shared with other replicas.

    Raises:
        ConfigError: for a setting that cannot be used.
        ModelError: for a model that cannot be loaded.
        DeepLost: if no deep replica takes the connection, with each one's reason.
    """
    prepare(config)
    sys.setswitchinterval(_SWITCH_S)
    directory, plan, adapter = _plan(config)
    decoder = load_decoder(
        directory,
        dtype=plan.dtype,
        device=config.device,
        layers=(0, plan.exit_layer),
        head=needs_lm_head(plan.model, adapter, config.exit_vocab),
        adapter=adapter,
        layer_bits=plan.layer_bits,
    )
    bits = config.bits.shallow
    head = build_exit_head(decoder, directory, adapter, config.exit_vocab, quantized=bool(bits))
    exit_layers = load_exit_layers(decoder, adapter, bits) if adapter else None
    backend = load_backend(directory)
    return_freed_memory()
    size, rows = config.block_size, config.max_num_batched_tokens
    runs = Running.of(config)
    shallow, shallow_full = measure_shallow(
        decoder, head, plan.exit_layer, size, rows, exit_layers, runs
    )
    stage = new_stage(decoder, (0, plan.exit_layer), plan.num_blocks, size, exit_layers, runs)
    deep = RemoteDeepStage.when_there(
        peers,
        hello_of(plan, plan.num_blocks - 1),
        wait_s=wait_s,
        token=token,
        tls=tls,
        deadline_s=deadline_s,
        give_up_s=give_up_s,
        on_lost=on_lost,
    )
    costs = StageCosts(
        shallow=shallow, shallow_full=shallow_full, deep=CostCurve(tuple(deep.costs))
    )
    return engine_over(plan, stage, head, deep, costs, backend, store)


def hello_of(plan: SplitPlan, num_blocks: int) -> Hello:
    """What both ends of an exchange must agree on."""
    return Hello(
        version=VERSION,
        weights_digest=plan.weights_digest,
        adapter=plan.deep_adapter,
        first_layer=plan.exit_layer,
        last_layer=plan.model.num_layers,
        dtype=plan.config.dtype,
        block_size=plan.config.block_size,
        hidden_size=plan.model.hidden_size,
        vocab_size=plan.model.vocab_size,
        num_blocks=num_blocks,
    )


def _plan(config: EngineConfig) -> tuple[Path, SplitPlan, Adapter | None]:
    directory = resolve_model(config.model)
    digest = weights_digest(directory)
    adapter = adapter_of(config, digest)
    model = ModelConfig.from_directory(directory)
    plan = SplitPlan.make(
        config,
        model,
        exit_layer=exit_layer_of(config, model, adapter),
        weights_digest=model_digest(digest, model, config.bits),
        adapter=adapter,
    )
    return directory, plan, adapter
