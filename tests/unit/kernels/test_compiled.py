"""Compiling the kernels, and doing without; the small ones against torch code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fathom.kernels.compiled import optional_library
from fathom.models.linear import rms_norm
from fathom.models.rope import RotaryEmbedding, rotate_

DTYPES = [torch.float32, torch.bfloat16]
_HALF = """
import torch
from fathom.kernels.compiled import library
x = torch.tensor([[1.0, 2.0]])
out, weight = torch.empty_like(x), torch.ones(2)
library().fathom_rms_norm(x.data_ptr(), 0, 1, 2, 2, weight.data_ptr(), 0.0, out.data_ptr())
print(out.tolist())
"""


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.skipif(optional_library() is None, reason="needs a C++ compiler")
def test_they_are_compiled_once_into_the_cache(tmp_path: Path) -> None:
    first = run_python(_HALF, FATHOM_CACHE=str(tmp_path))
    assert first.returncode == 0, first.stderr
    built = list((tmp_path / "kernels").glob("*/kernels.so"))
    assert len(built) == 1
    age = built[0].stat().st_mtime_ns
    assert run_python(_HALF, FATHOM_CACHE=str(tmp_path)).stdout == first.stdout
    assert built[0].stat().st_mtime_ns == age


def test_without_a_compiler_the_error_says_what_to_install(tmp_path: Path) -> None:
    done = run_python(_HALF, FATHOM_CACHE=str(tmp_path), PATH=str(tmp_path), CXX="")
    assert "no C++ compiler was found" in done.stderr
    assert "apt-get install g++" in done.stderr


@pytest.mark.parametrize("off", ["PATH", "FATHOM_KERNELS"])
def test_torch_does_their_work_where_there_are_none(tmp_path: Path, off: str) -> None:
    code = """
import torch
from fathom.attention.paged import backend_for
from fathom.attention.pool import KVPool
from fathom.models.linear import rms_norm
pool = KVPool(num_layers=1, num_kv_heads=1, head_dim=16, num_blocks=2, block_size=2,
              dtype=torch.float32)
print(type(backend_for(pool)).__name__, rms_norm(torch.ones(1, 4), torch.ones(4), 0.0).tolist())
"""
    value = "off" if off == "FATHOM_KERNELS" else str(tmp_path)
    done = run_python(code, FATHOM_CACHE=str(tmp_path), CXX="", **{off: value})
    assert done.stdout.split(maxsplit=1) == ["SdpaBackend", "[[1.0, 1.0, 1.0, 1.0]]\n"], done.stderr


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_rounds_where_torch_does(dtype: torch.dtype) -> None:
    rotary = RotaryEmbedding((1.0, 0.3, 0.01, 0.002), 1.0, dtype, torch.device("cpu"))
    cos, sin = rotary(torch.tensor([0, 5, 77]))
    torch.manual_seed(0)
    wide = torch.randn(3, 7, 8).to(dtype)  # queries and keys lie before the values
    expected = wide.clone()
    heads = expected[:, :5]
    rolled = heads.roll(4, -1).mul_(sin)
    heads.mul_(cos).add_(rolled)
    rotate_(wide[:, :5], cos, sin)
    if dtype is torch.bfloat16:
        assert torch.equal(wide, expected)
    else:  # a compiler may fuse the product with the sum
        torch.testing.assert_close(wide, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_agrees_with_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 96).to(dtype)[:, :80], torch.rand(80).to(dtype)
    expected = F.rms_norm(x, (80,), None, 1e-5) * weight
    tolerance = 1e-6 if dtype is torch.float32 else 1e-2  # one unit in the last place
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected, rtol=tolerance, atol=0)
