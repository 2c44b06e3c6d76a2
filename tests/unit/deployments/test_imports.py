"""What a server's processes import: each second of it is one that users wait for a replica."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import environment
from tests.tiny_models import tiny_model

__all__ = ["tiny_model"]

ENGINE = """
import deployments.replica
from fathom.config import EngineConfig
from fathom.engine.build import build_engine
config = EngineConfig(model={model!r}, dtype="float32", adapter="none", kv_cache_bytes=4 << 20)
assert build_engine(config, encodes=False).tokenizer is None
"""


def imported(script: str) -> set[str]:
    """Packages that a process has imported after a script."""
    script += "\nimport json, sys; print(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False,
        env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", ["app", "cluster"])
def test_who_builds_an_application_loads_no_torch(module: str) -> None:
    found = imported(f"import deployments.{module}")
    assert "ray.serve" in found
    assert not found & {"torch", "transformers", "mlflow", "sklearn", "scipy.stats"}


def test_a_replica_of_a_known_model_loads_no_transformers(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FATHOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FATHOM_KERNELS", "off")  # they would be compiled into that cache
    script = ENGINE.format(model=str(tiny_model))
    assert "transformers" in imported(script)  # the first one reads the model's files
    found = imported(script)
    assert "torch" in found
    assert not found & {"transformers", "torch._dynamo", "mlflow", "sklearn", "scipy.stats"}


def test_the_gateway_of_a_known_model_loads_no_torch(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FATHOM_CACHE", str(tmp_path / "cache"))
    script = f"""
from pathlib import Path
import deployments.ingress
from fathom.models.tokenizer import load_tokenizer
tokenizer = load_tokenizer(Path({str(tiny_model)!r}))
assert tokenizer.decode(tokenizer.encode("a few words")) == "a few words"
"""
    assert "torch" in imported(script)  # the first one asks which class it is
    assert not imported(script) & {"torch", "mlflow", "sklearn", "scipy.stats"}
