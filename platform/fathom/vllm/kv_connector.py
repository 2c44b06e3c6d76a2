"""vLLM's connector to Fathom's KV store: replicas of both reuse each other's prefixes.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "FathomConnector",
        "kv_role": "kv_both", "kv_connector_extra_config": {"application": "default"}}'

``kv_connector_extra_config``:
    application: the Serve application whose replicas share the store (``default``); ``store``
        names a store itself. ray_address: of the cluster; empty finds the one of this machine.
        Where Ray asks for a token, vLLM's environment must have it as any client's.
    adapter, exit_layer, block_size, dtype, model: as in ``engine`` of the Fathom replicas'
        settings, where those differ from the defaults: they decide where the stages part and
        which blocks are meant. ``dtype`` and ``model`` default to vLLM's own.

A store that fails or cannot be reached is a miss. Blocks of a ``dtype`` other than vLLM's are
converted as they are loaded, and none are stored: they would not be what their keys say. Not shared
are requests with a LoRA adapter, with multimodal inputs or with prompt embeddings.

Loading happens within the step that admits a request, before its forward pass; storing reads the
cache after the pass that filled it, and goes on behind it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec

from fathom.vllm.kv_client import client_of
from fathom.vllm.kv_keys import SETTINGS, KVLayout
from fathom.vllm.kv_layout import Packing, Write, write_plain
from fathom.vllm.kv_move import KVMover
from fathom.vllm.kv_schedule import Jobs, KVSchedule

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = init_logger(__name__)

_CPU = "CPU_ATTN"
_PLAIN = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION")


class FathomMetadata(KVConnectorMetadata):
    """What the worker has to do in a step."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs


class FathomConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module.

    Raises:
        ValueError: for a setting, or a kind of cache, that cannot be shared; as vLLM starts.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = self._kv_transfer_config
        # A block that was found and is lost again must not cost the request.
        transfer.kv_load_failure_policy = "recompute"
        extra = dict(transfer.kv_connector_extra_config)
        own = str(vllm_config.model_config.dtype).removeprefix("torch.")
        model = vllm_config.model_config.model
        self._layout = KVLayout.of({"model": model, "dtype": own, **_only(extra, SETTINGS)})
        self._block_size = _check(vllm_config, kv_cache_config, self._layout)
        self._client = client_of(extra)
        saves = transfer.is_kv_producer and self._layout.plan.config.dtype == own
        self._schedule = KVSchedule(
            self._layout, self._client, saves=saves, block_size=self._block_size
        )
        self._mover: KVMover | None = None
        self._lost: set[int] = set()
        self._read: set[str] = set()

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is dropped is a miss of somebody's later."""
        return False

    # The scheduler's side.

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """See the base class: they are loaded within the step."""
        if not _is_shared(request):
            return 0, False
        found = self._schedule.match(
            request.request_id,
            request.all_token_ids,
            request.num_prompt_tokens,
            request.cache_salt or "",
            num_computed_tokens,
        )
        return (found if self._kv_transfer_config.is_kv_consumer else 0), False

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """See the base class."""
        self._schedule.allocated(request.request_id, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """See the base class."""
        scheduled = scheduler_output.num_scheduled_tokens
        for new in scheduler_output.scheduled_new_reqs:
            done = new.num_computed_tokens + scheduled[new.req_id]
            self._schedule.computed(new.req_id, None, done)
        known = scheduler_output.scheduled_cached_reqs
        for request, computed, added in zip(
            known.req_ids, known.num_computed_tokens, known.new_block_ids, strict=True
        ):
            # Those of a request that resumes came with its allocation.
            resumed = request in known.resumed_req_ids
            blocks = None if added is None or resumed else added[0]
            self._schedule.computed(request, blocks, computed + scheduled[request])
        return FathomMetadata(self._schedule.take())

    def request_finished(
        self, request: Request, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See the base class: vLLM keeps the blocks until the worker has read the last of them."""
        return self._schedule.finished(request.request_id, request.num_computed_tokens), None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """See the base class; there is one group."""
        return self.request_finished(request, block_ids[0])

    # The worker's side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """See the base class.

        Raises:
            ValueError: for a backend whose caches are not understood.
        """
        names = sorted(kv_caches, key=extract_layer_index)
        caches = [kv_caches[name] for name in names]
        heads, _, head_dim = self._layout.layer_shape
        expected = (heads // 2, 2 * head_dim)
        shape = caches[0].shape
        if len(shape) != 4 or (shape[1], shape[3]) != expected or self._block_size % shape[2]:
            raise ValueError(
                f"KV cache of shape {tuple(shape)}; FathomConnector expects [blocks, "
                f"{expected[0]}, block size, {expected[1]}]: use another attention backend."
            )
        layer = self._vllm_config.compilation_config.static_forward_context[names[0]]
        write, packing = _backend(layer, self._vllm_config, caches[0])
        self._mover = KVMover(self._layout, caches, packing, write, self._block_size)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """See the base class: what the step needs is there on return."""
        for job in self._jobs().loads:
            lost = self._moving().load(job, self._client())
            self._lost |= lost
            logger.debug(
                "%d tokens of %s %s", job.stop - job.start, job.request, "lost" if lost else "found"
            )

    def wait_for_layer_load(self, layer_name: str) -> None:
        """All layers are there when the pass begins."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: AttentionMetadata, **_: Any
    ) -> None:
        """All layers are read when the pass has ended."""

    def wait_for_save(self) -> None:
        """See the base class: copies what is due; the rest goes on behind it."""
        for job in self._jobs().saves:
            self._moving().save(job, self._client())
            if job.last:
                self._read.add(job.request)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """See the base class."""
        if self._mover is not None:
            self._mover.finished(finished_req_ids)
        read, self._read = self._read, set()
        return read or None, None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """See the base class."""
        lost, self._lost = self._lost, set()
        return lost

    def shutdown(self) -> None:
        """Let what is on its way to the store arrive."""
        if self._mover is not None:
            self._mover.close()

    def _jobs(self) -> Jobs:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, FathomMetadata)
        return metadata.jobs

    def _moving(self) -> KVMover:
        assert self._mover is not None, "vLLM has registered no KV caches"
        return self._mover


def _only(settings: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: settings[name] for name in names if name in settings}


def _is_shared(request: Request) -> bool:
    """Whether tokens alone decide over a request's keys and values."""
    plain = request.lora_request is None and not request.mm_features
    return plain and request.prompt_token_ids is not None and request.prompt_embeds is None


def _check(config: VllmConfig, cache: KVCacheConfig, layout: KVLayout) -> int:
    """The block size of vLLM's scheduler.

    Raises:
        ValueError: for what cannot be shared.
    """
    parallel = config.parallel_config
    if parallel.world_size > 1:
        raise ValueError(
            f"FathomConnector needs one worker with all heads and layers, got "
            f"{parallel.world_size}: use tensor and pipeline parallel size 1."
        )
    groups = cache.kv_cache_groups
    if len(groups) != 1 or type(groups[0].kv_cache_spec) is not FullAttentionSpec:
        raise ValueError("FathomConnector shares full attention only; this model has other layers.")
    if len(groups[0].layer_names) != layout.num_layers:
        raise ValueError(
            f"the model has {layout.num_layers} layers, vLLM caches {len(groups[0].layer_names)}: "
            "a draft model or shared layers cannot be beside FathomConnector."
        )
    if config.cache_config.cache_dtype not in ("auto", "float16", "bfloat16"):
        raise ValueError(
            f"kv_cache_dtype {config.cache_config.cache_dtype!r}: FathomConnector shares caches "
            "that are not quantized; use auto."
        )
    return int(groups[0].kv_cache_spec.block_size)


def _backend(layer: Any, config: VllmConfig, cache: torch.Tensor) -> tuple[Write, Packing]:
    """How a layer's backend writes, and where.

    Raises:
        ValueError: for one that is not known.
    """
    name = layer.get_attn_backend().get_name()
    if name in _PLAIN:
        return write_plain, Packing()
    if name != _CPU:
        raise ValueError(
            f"attention backend {name}: FathomConnector knows {_CPU}, {', '.join(_PLAIN)}."
        )
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    _, _, size, width = cache.shape
    isa = _get_attn_isa(cache.dtype, size, width // 2, config.cache_config.cache_dtype)

    def write(
        cache: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
    ) -> None:
        blocks, heads, size, width = cache.shape
        whole = cache.view(blocks, heads, 2 * size, width // 2)
        key_cache, value_cache = whole.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            keys.contiguous(), values.contiguous(), key_cache, value_cache, slots, isa
        )

    return write, Packing.probe(write, size, width // 2, cache.dtype)
