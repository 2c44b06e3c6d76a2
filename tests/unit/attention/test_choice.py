"""Which attention backend is chosen, and what is said of one that cannot run."""

from __future__ import annotations

import pytest
import torch

from fathom.attention import choice
from fathom.attention.choice import choose_backend, name_of
from fathom.attention.paged import backend_for
from fathom.attention.pool import KVPool
from fathom.attention.sdpa import SdpaBackend
from fathom.config import ConfigError, EngineConfig

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def a_pool(dim: int = 64, dtype: torch.dtype = torch.float32) -> KVPool:
    return KVPool(
        num_layers=1, num_kv_heads=2, head_dim=dim, num_blocks=4, block_size=4, dtype=dtype
    )


def test_auto_on_a_cpu_is_what_it_was():
    for pool in (a_pool(), a_pool(20), a_pool(64, torch.float16)):
        assert type(choose_backend("auto", pool, 6)) is type(backend_for(pool))


@pytest.mark.parametrize("name", ["sdpa", "flex"])
def test_torchs_own_run_everywhere(name):
    assert name_of(choose_backend(name, a_pool(20), 6)) == name


@pytest.mark.parametrize(
    ("name", "pool", "message"),
    [
        ("kernel", a_pool(20), r"attention 'kernel' needs a CPU, .*take sdpa"),
        ("flashinfer", a_pool(), r"attention 'flashinfer' needs an NVIDIA GPU, .*'cpu'.*sdpa"),
    ],
)
def test_a_backend_that_cannot_run_is_refused(name, pool, message):
    with pytest.raises(ConfigError, match=message):
        choose_backend(name, pool, 6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention": "flash"}, "attention must be one of auto, kernel, .*got 'flash'"),
        ({"attention": "kernel", "device": "cuda:1"}, "'kernel' needs device cpu.*'cuda:1'"),
        ({"attention": "flashinfer"}, "'flashinfer' needs device cuda, and device is 'cpu'"),
        (
            {"attention": "flashinfer", "device": "cuda", "dtype": "float32"},
            "bfloat16 or float16, got float32",
        ),
    ],
)
def test_what_is_known_before_the_model_is_refused_by_the_settings(fields, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**fields).validate()


class Wrong(SdpaBackend):
    """Gives a tenth too much."""

    def plan(self, batch, pool, num_heads):
        attend = super().plan(batch, pool, num_heads)
        return lambda layer, q, kv: attend(layer, q, kv) * 1.1


class Broken(SdpaBackend):
    """As a library is whose kernels do not fit the GPU."""

    def plan(self, batch, pool, num_heads):
        raise OSError("no kernel image")


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Wrong, "other results than sdpa .*off by 0"), (Broken, "fails .*OSError: no kernel image")],
)
def test_a_backend_is_tried_before_it_serves(kind, message, monkeypatch):
    monkeypatch.setattr(choice, "_new", lambda name: kind())
    choice._tried.cache_clear()
    try:
        with pytest.raises(ConfigError, match=message):
            choose_backend("flex", a_pool(), 6)
    finally:
        choice._tried.cache_clear()
