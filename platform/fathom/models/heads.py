"""The exit head: what the shallow stage drafts with.

    logits = W[token_ids] @ norm(h + A @ h)

h is the exit layer's hidden state, norm an RMSNorm, A a trained linear map (or nothing) and W the
model's own LM head, whole or only its rows for the most frequent tokens: for small models the whole
head costs as much as many layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from fathom.models.config import ModelError
from fathom.models.decoder import Decoder
from fathom.models.linear import Linear
from fathom.models.weights import WeightFiles

FORMAT_VERSION = "1"


@dataclass(frozen=True, slots=True)
class TrainedHead:
    """A trained exit head as it lies in a safetensors file.

    Attributes:
        exit_layer: k, the layer whose output it reads.
        norm: [d] RMSNorm weight. adapter: [d, d] or None.
        token_ids: [n] int64, the most frequent tokens first.
    """

    exit_layer: int
    norm: torch.Tensor
    adapter: torch.Tensor | None
    token_ids: torch.Tensor


class ExitHead:
    """Scores the vocabulary, or a subset of it, from exit-layer hidden states.

    Attributes:
        token_ids: [n] int64 tokens that are scored, or None for the whole vocabulary.
        num_params: weights that one row is multiplied with.
    """

    def __init__(
        self,
        decoder: Decoder,
        norm: torch.Tensor,
        adapter: torch.Tensor | None,
        token_ids: torch.Tensor | None,
        rows: torch.Tensor | None,
    ) -> None:
        self._decoder = decoder
        self._norm = norm
        self._adapter = None if adapter is None else Linear(adapter)
        self._subset = None if rows is None else Linear(rows)
        self.token_ids = token_ids
        size = decoder.config.vocab_size if token_ids is None else len(token_ids)
        adapter_size = 0 if adapter is None else adapter.numel()
        self.num_params = size * decoder.config.hidden_size + adapter_size

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Score the scored tokens.

        Args:
            hidden: [rows, d] output of the exit layer.

        Returns:
            [rows, n] in the model's dtype, n the scored tokens.
        """
        if self._adapter is not None:
            hidden = self._adapter(hidden).add_(hidden)
        normed = F.rms_norm(
            hidden, hidden.shape[-1:], self._norm, self._decoder.config.rms_norm_eps
        )
        if self._subset is None:
            return self._decoder.project(normed)
        return self._subset(normed)

    def token_of(self, column: int) -> int:
        """The token that a column of ``logits`` scores."""
        return column if self.token_ids is None else int(self.token_ids[column])

    def spread(self, logits: torch.Tensor) -> torch.Tensor:
        """One row of ``logits`` [n] over the whole vocabulary [V], -inf where not scored."""
        if self.token_ids is None:
            return logits
        whole = logits.new_full((self._decoder.config.vocab_size,), float("-inf"))
        whole[self.token_ids] = logits
        return whole


def read_trained_head(path: str | Path) -> tuple[TrainedHead, dict[str, str]]:
    """Read a trained head and its metadata.

    Raises:
        ModelError: for a file that is missing, damaged, or of another format version.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format_version") != FORMAT_VERSION:
                raise ModelError(
                    f"{path}: exit head of format {metadata.get('format_version')!r}; this "
                    f"version of Fathom reads format {FORMAT_VERSION!r}. Train it again."
                )
            names = set(file.keys())
            head = TrainedHead(
                exit_layer=int(metadata["exit_layer"]),
                norm=file.get_tensor("norm.weight"),
                adapter=file.get_tensor("adapter.weight") if "adapter.weight" in names else None,
                token_ids=file.get_tensor("token_ids").long(),
            )
            return head, metadata
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelError(f"{path}: cannot read the exit head: {error}") from error


def packaged_head(model: str, weights_digest: str) -> Path | None:
    """The exit head that ships with Fathom for these weights, or for a model of this hub name.

    The same model comes in several forms (as released, or by way of a quantized file). A head
    fits them all: it only drafts, and what a draft may cost in quality is the accept mode's word.
    """
    folder = resources.files("fathom.models") / "exit_heads"
    if not folder.is_dir():
        return None
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".safetensors"):
            with resources.as_file(entry) as path, safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if weights_digest == metadata.get("weights_digest") or model == metadata["model"]:
                    return path
    return None


def build_exit_head(
    decoder: Decoder, model_dir: Path, trained: TrainedHead | None, exit_vocab: int
) -> ExitHead:
    """Build the exit head.

    Args:
        decoder: holds embedding, final norm and LM head.
        trained: a trained head, or None for the model's own norm and LM head.
        exit_vocab: tokens to score: -1 all, 0 the trained head's choice (all without one), n > 0
            the n most frequent. Without a trained head's ranking the lowest token ids are taken:
            byte-pair merges are learned most frequent first.

    Raises:
        ModelError: if the trained head does not fit the model.
    """
    config = decoder.config
    assert decoder.norm is not None
    ranked = torch.arange(config.vocab_size)
    count = config.vocab_size if exit_vocab <= 0 else min(exit_vocab, config.vocab_size)
    norm, adapter = decoder.norm, None
    if trained is not None:
        if len(trained.norm) != config.hidden_size:
            raise ModelError(
                f"the exit head is for hidden size {len(trained.norm)}, the model has "
                f"{config.hidden_size}: use the head that was trained for this model"
            )
        norm = trained.norm.to(decoder.device, decoder.dtype)
        adapter = (
            None if trained.adapter is None else trained.adapter.to(decoder.device, decoder.dtype)
        )
        if len(trained.token_ids):
            ranked = trained.token_ids
            if exit_vocab == 0:
                count = len(ranked)
            elif count > len(ranked) and count < config.vocab_size:
                raise ModelError(
                    f"exit_vocab must be at most {len(ranked)}, the tokens that the exit head "
                    f"ranks, or -1 for all, got {exit_vocab}"
                )
    if count == config.vocab_size:
        return ExitHead(decoder, norm, adapter, None, None)
    token_ids = ranked[:count].to(decoder.device)
    name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    shape = (config.vocab_size, config.hidden_size)
    rows = WeightFiles(model_dir).tensor(name, shape, decoder.dtype, decoder.device)[token_ids]
    return ExitHead(decoder, norm, adapter, token_ids, rows)
