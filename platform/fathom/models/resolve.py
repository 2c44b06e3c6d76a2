"""From a model's name to its directory on this machine. Imports neither torch nor transformers."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from fathom.models.cache import model_directory
from fathom.models.errors import ModelError
from fathom.models.files import weight_files

HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]


def resolve_model(name: str) -> Path:
    """Find a model's Hugging Face directory on this machine, or fetch it from the hub.

    Args:
        name: a directory, a GGUF file (converted once into the cache), or a hub name such as
            ``HuggingFaceTB/SmolLM2-135M-Instruct``.

    Returns:
        A directory with ``config.json``, safetensors and tokenizer files.

    Raises:
        ModelError: if there is no such model here and the hub does not give it.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf" or path.is_file():
        from fathom.models.gguf import converted_gguf  # torch and gguf only where needed

        return converted_gguf(path)
    if path.is_dir():
        return path.resolve()
    local = find_local(name)
    if local is not None:
        return local
    advice = f"Run `fathom pull {name}`, or give a local directory or GGUF file."
    if is_offline_mode():
        raise ModelError(
            f"{name}: not on this machine, and HF_HUB_OFFLINE forbids fetching it. {advice}"
        )
    try:
        return fetch_from_hub(name)
    except ModelError as error:
        raise ModelError(f"{error} {advice}") from error


def find_local(name: str) -> Path | None:
    """The directory of a hub name among the models already fetched, or None.

    The hub's own cache comes first: its weights are the originals, while the model cache may hold
    a copy that went through a quantized file.

    Raises:
        ModelError: if the name is not a valid hub name.
    """
    try:
        snapshot = Path(snapshot_download(name, local_files_only=True))
        weight_files(snapshot)  # a download that was interrupted leaves a partial snapshot
        if (snapshot / "config.json").exists():
            return snapshot
    except HFValidationError as error:
        raise ModelError(
            f"{name}: no such directory or GGUF file, and no valid hub name ({error})."
        ) from error
    except (LocalEntryNotFoundError, ModelError):
        pass
    cached = model_directory(name)
    return cached if cached.is_dir() else None


def fetch_from_hub(name: str) -> Path:
    """Download a model's files into the hub's cache, or complete them there.

    Raises:
        ModelError: if the hub cannot be reached, or has no such model.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:  # the hub's errors all derive from one of these
        raise ModelError(f"{name}: the Hugging Face hub did not give it: {error}.") from error
