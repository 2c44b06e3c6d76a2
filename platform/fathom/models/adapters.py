"""Adapters: what training adds to a model so that it can exit early, in one safetensors file.

An adapter holds an exit layer k, an exit head, and perhaps
- exit layers: layers [k, k + M) of the shallow path alone, between the shared layers and the head;
- low-rank changes of the model's own layers (LoRA), W + B A, which change the full path too.

Tensors are named as in the model: ``exit_layers.0.mlp.up_proj.weight``,
``lora.0.mlp.up_proj.A`` [rank, in] and ``.B`` [out, rank] (its scaling is in B), ``head.norm``,
``head.adapter`` and ``token_ids``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fathom.models.errors import ModelError

FORMAT_VERSION = "2"
FILE_NAME = "adapter.safetensors"
DEFAULT = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What lies in an adapter's file.

    Attributes:
        exit_layer: k, layers that the shallow path shares with the full path.
        exit_layers: M, layers of its own that follow.
        norm: [d] RMSNorm weight of the head. head_adapter: [d, d], or None.
        token_ids: [n] int64 tokens that the head scores, most frequent first; empty: all.
        layers: tensors of the exit layers by the name that follows ``model.layers.`` in the model,
            numbered from k. lora: (A, B) of the model's own weights, by their full names.
        metadata: model, weights_digest, and whatever training noted.
        digest: SHA-256 of the file's contents; empty for one that was never written.
    """

    exit_layer: int
    exit_layers: int = 0
    norm: Tensor
    head_adapter: Tensor | None = None
    token_ids: Tensor
    layers: Mapping[str, Tensor] = field(default_factory=dict)
    lora: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""

    @property
    def changes_model(self) -> bool:
        """Whether the full path is another one than the model's."""
        return bool(self.lora)

    def write(self, folder: Path) -> Path:
        """Write ``adapter.safetensors`` into a folder, whole or not at all; returns the file."""
        tensors = {"head.norm": self.norm, "token_ids": self.token_ids.int()}
        if self.head_adapter is not None:
            tensors["head.adapter"] = self.head_adapter
        for name, tensor in self.layers.items():
            index, rest = name.split(".", 1)
            tensors[f"exit_layers.{int(index) - self.exit_layer}.{rest}"] = tensor
        for name, (a, b) in self.lora.items():
            stem = name.removeprefix("model.layers.").removesuffix(".weight")
            tensors[f"lora.{stem}.A"], tensors[f"lora.{stem}.B"] = a, b
        metadata = {
            **self.metadata,
            "format_version": FORMAT_VERSION,
            "exit_layer": str(self.exit_layer),
            "exit_layers": str(self.exit_layers),
        }
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / FILE_NAME
        partial = file.with_suffix(".partial")
        save_file({name: t.contiguous() for name, t in tensors.items()}, partial, metadata)
        partial.chmod(0o644)  # safetensors makes files that only their owner reads
        partial.replace(file)
        return file


def read_adapter(path: str | Path) -> Adapter:
    """Read an adapter.

    Args:
        path: its folder or its file.

    Raises:
        ModelError: for a file that is missing, damaged, or of another format version.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file /= FILE_NAME
    try:
        with safe_open(str(file), framework="pt") as reader:
            metadata = reader.metadata() or {}
            if metadata.get("format_version") != FORMAT_VERSION:
                raise ModelError(
                    f"{file}: adapter of format {metadata.get('format_version')!r}; this version "
                    f"of Fathom reads format {FORMAT_VERSION!r}. Train it again."
                )
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return _assemble(tensors, metadata, digest)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{file}: cannot read the adapter: {error}") from error


def _assemble(tensors: dict[str, Tensor], metadata: dict[str, str], digest: str) -> Adapter:
    exit_layer = int(metadata["exit_layer"])
    layers: dict[str, Tensor] = {}
    lora: dict[str, tuple[Tensor, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "exit_layers":
            index, tail = rest.split(".", 1)
            layers[f"{int(index) + exit_layer}.{tail}"] = tensor
        elif kind == "lora" and rest.endswith(".A"):
            stem = rest.removesuffix(".A")
            lora[f"model.layers.{stem}.weight"] = (tensor, tensors[f"lora.{stem}.B"])
    return Adapter(
        exit_layer=exit_layer,
        exit_layers=int(metadata["exit_layers"]),
        norm=tensors["head.norm"],
        head_adapter=tensors.get("head.adapter"),
        token_ids=tensors["token_ids"].long(),
        layers=layers,
        lora=lora,
        metadata=metadata,
        digest=digest,
    )


def packaged_adapters() -> dict[str, Path]:
    """Folders of the adapters that ship with Fathom, by name."""
    root = Path(str(resources.files("fathom"))) / "adapters"
    if not root.is_dir():
        return {}
    return {path.name: path for path in sorted(root.iterdir()) if (path / FILE_NAME).is_file()}


def find_adapter(name: str, model: str, weights_digest: str) -> Adapter | None:
    """The adapter that a setting asks for.

    Args:
        name: ``auto`` (the packaged default, if it was trained for this model), ``none``, the
            name of a packaged adapter, or a path.
        model: hub name, directory or file of the model. weights_digest: of its weights. The same
            model comes in several forms (as released, or by way of a quantized file), so either
            of the two will do for ``auto``.

    Raises:
        ModelError: if there is no such adapter.
    """
    packaged = packaged_adapters()
    if name == "none":
        return None
    if name == "auto":
        for path in packaged.values():
            if path.name.startswith(DEFAULT):
                adapter = read_adapter(path)
                known = adapter.metadata
                if weights_digest == known.get("weights_digest") or model == known.get("model"):
                    return adapter
        return None
    if name in packaged:
        return read_adapter(packaged[name])
    if not Path(name).expanduser().exists():
        raise ModelError(
            f"adapter {name!r}: no such file or folder, and none that ships with Fathom "
            f"({', '.join(packaged) or 'there are none'}). `none` does without one."
        )
    return read_adapter(name)


def training_notes(adapter: Adapter) -> dict[str, object]:
    """What training noted about itself."""
    notes: dict[str, object] = json.loads(adapter.metadata.get("training", "{}"))
    return notes
