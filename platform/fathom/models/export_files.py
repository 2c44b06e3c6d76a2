"""An exported draft on disk: weights, tokenizer, how it is loaded, and perhaps its target."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from fathom.models.adapters import Adapter
from fathom.models.cache import cache_root
from fathom.models.config import ModelError
from fathom.models.export import copy_model, copy_other_files, draft_of, write_model
from fathom.models.export_vocab import choose_tokens, narrowed, write_tokenizer
from fathom.models.files import weights_digest
from fathom.models.tokenizer import load_tokenizer

NOTES = "fathom.json"
TARGET = "target"
_NUM_SPECULATIVE_TOKENS = 2


def export(
    directory: Path,
    adapter: Adapter | None,
    out: Path,
    *,
    exit_layer: int,
    vocab: int = 0,
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """Write a model's shallow path as a draft model for vLLM.

    Args:
        directory: of the model, from ``resolve_model``. One that was converted from a GGUF file
            is written too, to ``out/target``.
        adapter, exit_layer: see ``export.draft_of``.
        out: a folder that is empty or not there; made whole or not at all.
        vocab: tokens of the draft, see ``export_vocab``; 0 for those of the model.
        dtype: of the weights in the files.

    Returns:
        What ``fathom.json`` in the folder says: where the draft is from, and the
        ``speculative_config`` that loads it.

    Raises:
        ModelError: as ``draft_of`` does, for a vocabulary as large as the model's, or a folder
            that is not empty or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out}: not an empty folder; name another.")
    out = out.absolute()
    partial = out.with_name(f"{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        target = _write(directory, adapter, partial, exit_layer, vocab, dtype)
        notes = _notes(directory, adapter, exit_layer, vocab, dtype)
        notes["target"] = str(out / TARGET if target else directory)
        notes["speculative_config"]["model"] = str(out)
        (partial / NOTES).write_text(json.dumps(notes, indent=2) + "\n")
        if out.is_dir():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise ModelError(f"{out}: cannot be written: {error}. Name another folder.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return notes


def _write(
    directory: Path, adapter: Adapter | None, out: Path, exit_layer: int, vocab: int, dtype: str
) -> bool:
    """Fill the folder; whether the target is in it."""
    kind: torch.dtype = getattr(torch, dtype)
    draft = draft_of(directory, adapter, exit_layer)
    if vocab:
        tokenizer = load_tokenizer(directory)
        ranked = torch.arange(0) if adapter is None else adapter.token_ids
        kept = choose_tokens(ranked, tokenizer, vocab)
        draft = narrowed(draft, kept)
        write_tokenizer(tokenizer, kept, out)
    else:
        copy_other_files(directory, out)
    write_model(draft, out, kind)
    if not directory.is_relative_to(cache_root().resolve()):
        return False
    # Converted from a GGUF file: a directory of ours, which no one else has.
    (out / TARGET).mkdir()
    copy_model(directory, out / TARGET, kind)
    return True


def _notes(
    directory: Path, adapter: Adapter | None, exit_layer: int, vocab: int, dtype: str
) -> dict[str, Any]:
    speculative: dict[str, Any] = {
        "method": "draft_model",
        "num_speculative_tokens": _NUM_SPECULATIVE_TOKENS,
    }
    if vocab:
        speculative["use_heterogeneous_vocab"] = True
    return {
        "weights_digest": weights_digest(directory),
        "adapter": "" if adapter is None else adapter.metadata.get("name", ""),
        "adapter_digest": "" if adapter is None else adapter.digest,
        "exit_layer": exit_layer,
        "exit_layers": 0 if adapter is None else adapter.exit_layers,
        "vocab": vocab,
        "dtype": dtype,
        "speculative_config": speculative,
    }
