"""A replica holds its weights, its KV pool and what any Ray worker with torch holds; no more."""

from __future__ import annotations

from pathlib import Path

import psutil
import ray
import torch

from fathom.config import EngineConfig
from fathom.models.adapters import FILE_NAME, packaged_adapters
from fathom.models.files import weight_files
from fathom.models.load import resolve_model
from tests.ray_fixtures import TestServer

MIB = 1 << 20
POOL = 512 * MIB


@ray.remote(num_cpus=0)
class BareWorker:
    """A Ray worker that has imported what every Serve replica of a torch model has to."""

    def resident(self) -> int:
        from ray import serve  # noqa: F401

        torch.zeros(1)
        return int(psutil.Process().memory_info().rss)


@ray.remote(num_cpus=0)
class LoadedWorker:
    """The same with an engine, every block of whose pool has been written."""

    def resident(self, config: EngineConfig) -> int:
        from ray import serve  # noqa: F401

        from fathom.engine.engine import Engine

        self.engine = Engine.from_config(config)
        for stage in (self.engine._shallow._stage, self.engine._deep._stage):
            stage.pool.data.fill_(0.5)
        return int(psutil.Process().memory_info().rss)


def test_resident_memory_is_weights_pool_and_worker(server: TestServer) -> None:
    """In bfloat16, with the whole KV pool touched: within 1.3x."""
    bare, loaded = BareWorker.remote(), LoadedWorker.remote()
    config = EngineConfig(dtype="bfloat16", kv_cache_bytes=POOL, threads=1)
    worker = ray.get(bare.resident.remote())
    resident = ray.get(loaded.resident.remote(config))
    for actor in (bare, loaded):
        ray.kill(actor)
    weights = weights_bytes(resolve_model(config.model), torch.bfloat16)
    weights += (packaged_adapters()["default"] / FILE_NAME).stat().st_size  # bfloat16 as it lies
    limit = 1.3 * (weights + POOL + worker)
    parts = f"weights {weights / MIB:.0f} + pool {POOL / MIB:.0f} + worker {worker / MIB:.0f} MiB"
    assert resident <= limit, f"{resident / MIB:.0f} MiB; {parts}"
    print(f"resident {resident / MIB:.0f} MiB = {resident / limit * 1.3:.2f} x ({parts})")


def weights_bytes(directory: Path, dtype: torch.dtype) -> int:
    """Bytes of the model's weights in a dtype."""
    from safetensors import safe_open

    total = 0
    for file in weight_files(directory):
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118
                shape = reader.get_slice(name).get_shape()
                total += int(torch.Size(shape).numel()) * dtype.itemsize
    return total
