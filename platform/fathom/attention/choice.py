"""Which attention backend a pool gets: chosen once, at start, and said in ``EngineInfo``."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache

import torch

from fathom.attention.backend import AttentionBackend, RaggedBatch, SequenceRows
from fathom.attention.paged import PagedBackend, backend_for
from fathom.attention.pool import KVPool
from fathom.attention.sdpa import SdpaBackend
from fathom.settings import ConfigError

_log = logging.getLogger(__name__)


def choose_backend(attention: str, pool: KVPool, num_heads: int) -> AttentionBackend:
    """The backend of a name for a pool; for ``auto`` the fastest that is known to be right.

    What runs on a GPU is tried first on a few rows beside SDPA.

    Args:
        attention: one of ``names.ATTENTIONS``. num_heads: query heads.

    Raises:
        ConfigError: for a backend that cannot run over this pool, on this machine.
    """
    if attention == "sdpa":
        return SdpaBackend()
    if attention == "auto" and pool.data.device.type == "cpu":
        return backend_for(pool)
    if attention == "kernel":
        backend = backend_for(pool)
        if not isinstance(backend, PagedBackend):
            raise _refusal(attention, "needs a CPU, a C++ compiler, and float32 or bfloat16")
        return backend
    name = "flashinfer" if attention == "auto" else attention
    fault = _fault(name, pool) or _tried(
        name, pool.data.dtype, pool.data.device, num_heads, pool.num_kv_heads, pool.head_dim
    )
    if not fault:
        return _new(name)
    if attention != "auto":
        raise _refusal(name, fault)
    return SdpaBackend()


def name_of(backend: AttentionBackend) -> str:
    """The name of a backend, out of ``names.ATTENTIONS``."""
    if isinstance(backend, PagedBackend):
        return "kernel"
    return "sdpa" if isinstance(backend, SdpaBackend) else str(getattr(backend, "name", "other"))


def _refusal(name: str, fault: str) -> ConfigError:
    return ConfigError(f"attention {name!r} {fault}: leave it out, or take sdpa, which runs here.")


def _new(name: str) -> AttentionBackend:
    if name == "flex":
        from fathom.attention.flex import FlexBackend

        return FlexBackend()
    from fathom.attention.flashinfer import FlashInferBackend

    return FlashInferBackend()


def _fault(name: str, pool: KVPool) -> str:
    """What keeps a backend from running over a pool, as far as it is known beforehand."""
    if name != "flashinfer":
        return ""
    from fathom.attention.flashinfer import DTYPES, HEAD_DIMS

    if not pool.data.is_cuda:
        return f"needs an NVIDIA GPU, and device is {str(pool.data.device)!r}"
    if importlib.util.find_spec("flashinfer") is None:
        return "needs FlashInfer (pip install 'fathom-serve[gpu]')"
    if pool.data.dtype not in DTYPES:
        return f"needs dtype bfloat16 or float16, not {str(pool.data.dtype)[6:]}"
    if pool.head_dim not in HEAD_DIMS:
        return f"needs heads of {', '.join(map(str, HEAD_DIMS))}, not {pool.head_dim}"
    return ""


@cache
def _tried(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> str:
    """What a backend does wrong on a few rows, beside SDPA; empty for nothing.

    Its kernels may be compiled here, or turn out not to be there for this GPU.
    """
    shape = (dtype, device, num_heads, num_kv_heads, head_dim)
    expected = _sample(SdpaBackend(), *shape)
    try:
        found = _sample(_new(name), *shape)
    except Exception as error:  # a library's own, of any kind
        _log.warning("attention %r fails on this machine: %s", name, error, exc_info=error)
        return f"fails on this machine ({type(error).__name__}: {error})"
    tolerance = 1e-3 if dtype is torch.float32 else 3e-2
    if torch.allclose(found, expected, rtol=tolerance, atol=tolerance):
        return ""
    off = float((found - expected).abs().max())
    _log.warning("attention %r is off by %.3g from sdpa on this machine", name, off)
    return f"gives other results than sdpa on this machine (off by {off:.3g})"


def _sample(
    backend: AttentionBackend,
    dtype: torch.dtype,
    device: torch.device,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> torch.Tensor:
    """Attention of a few random rows: a prompt, a decoding sequence, and rows of a stack."""
    pool = KVPool(
        num_layers=1,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_blocks=10,
        block_size=16,
        dtype=dtype,
        device=device,
    )
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    pool.data.copy_(random(*pool.data.shape))
    sequences = [
        SequenceRows([5, 2], 0, 20),
        SequenceRows([7, 1, 3], 39, 1),
        SequenceRows([9], 6, 4),
    ]
    batch = RaggedBatch.build(sequences, pool)
    q = random(batch.num_rows, num_heads, head_dim)
    kv = random(batch.num_rows, 2 * num_kv_heads, head_dim)
    return backend.plan(batch, pool, num_heads)(0, q, kv).float()
