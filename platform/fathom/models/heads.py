"""The exit head: what the shallow stage drafts with.

    logits = W[token_ids] @ norm(h + A @ h)

h is the hidden state at the end of the shallow path, norm an RMSNorm, A a trained linear map (or
nothing) and W the model's own LM head, whole or only its rows for the most frequent tokens: for
small models the whole head costs as much as many layers.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from fathom.models.adapters import Adapter
from fathom.models.config import ModelConfig, ModelError
from fathom.models.decoder import Decoder
from fathom.models.kernel_linear import make_linear, runs_halves
from fathom.models.quantized import HEAD_BITS
from fathom.models.weights import WeightFiles


class ExitHead:
    """Scores the vocabulary, or a subset of it, from hidden states of the shallow path.

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
        bits: int = 0,
    ) -> None:
        self._decoder = decoder
        self._norm = norm
        if not bits and runs_halves(decoder.dtype, decoder.device, [decoder.config.hidden_size]):
            bits = 16
        self._adapter = None if adapter is None else make_linear(adapter, bits=bits)
        self._subset = None if rows is None else make_linear(rows, bits=bits)
        self.token_ids = token_ids
        self._tokens = None if token_ids is None else token_ids.tolist()
        self._columns = None if self._tokens is None else {t: i for i, t in enumerate(self._tokens)}
        size = decoder.config.vocab_size if token_ids is None else len(token_ids)
        adapter_size = 0 if adapter is None else adapter.numel()
        self.num_params = size * decoder.config.hidden_size + adapter_size

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Score the scored tokens.

        Args:
            hidden: [rows, d] output of the shallow path's last layer.

        Returns:
            [rows, n] in the model's dtype, n the scored tokens.
        """
        if self._adapter is not None:
            hidden = self._adapter.added(hidden, hidden)
        normed = F.rms_norm(
            hidden, hidden.shape[-1:], self._norm, self._decoder.config.rms_norm_eps
        )
        if self._subset is None:
            return self._decoder.project(normed)
        return self._subset(normed)

    def token_of(self, column: int) -> int:
        """The token that a column of ``logits`` scores."""
        return column if self._tokens is None else self._tokens[column]

    def column_of(self, token: int) -> int | None:
        """The column of ``logits`` that scores a token; None if none does."""
        return token if self._columns is None else self._columns.get(token)

    def spread(self, logits: torch.Tensor) -> torch.Tensor:
        """One row of ``logits`` [n] over the whole vocabulary [V], -inf where not scored."""
        if self.token_ids is None:
            return logits
        whole = logits.new_full((self._decoder.config.vocab_size,), float("-inf"))
        whole[self.token_ids] = logits
        return whole


def needs_lm_head(config: ModelConfig, adapter: Adapter | None, exit_vocab: int) -> bool:
    """Whether the exit head scores the whole vocabulary, and so runs the model's own LM head.

    Args:
        adapter, exit_vocab: as in ``build_exit_head``.
    """
    return _num_scored(config, adapter, exit_vocab) == config.vocab_size


def build_exit_head(
    decoder: Decoder,
    model_dir: Path,
    adapter: Adapter | None,
    exit_vocab: int,
    *,
    quantized: bool = False,
) -> ExitHead:
    """Build the exit head.

    Args:
        decoder: holds the final norm and the LM head if ``needs_lm_head``.
        adapter: a trained one, or None for the model's own norm and LM head.
        exit_vocab: tokens to score: -1 all, 0 the adapter's choice (all without one), n > 0 the n
            most frequent. Without an adapter's ranking the lowest token ids are taken: byte-pair
            merges are learned most frequent first.
        quantized: whether its weights have ``HEAD_BITS``, else those of the decoder's dtype.

    Raises:
        ModelError: if the adapter does not fit the model.
    """
    config = decoder.config
    files = WeightFiles(model_dir)
    bits = HEAD_BITS if quantized else 0
    ranked = torch.arange(config.vocab_size)
    count, linear = _num_scored(config, adapter, exit_vocab), None
    if adapter is None:
        shape: tuple[int, ...] = (config.hidden_size,)
        norm = files.tensor("model.norm.weight", shape, decoder.dtype, decoder.device)
    else:
        norm = adapter.norm.to(decoder.device, decoder.dtype)
        if adapter.head_adapter is not None:
            linear = adapter.head_adapter.to(decoder.device, decoder.dtype)
        if len(adapter.token_ids):
            ranked = adapter.token_ids
    if count == config.vocab_size:
        return ExitHead(decoder, norm, linear, None, None, bits)
    token_ids = ranked[:count].to(decoder.device)
    name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    shape = (config.vocab_size, config.hidden_size)
    rows = files.tensor(name, shape, decoder.dtype, decoder.device)[token_ids]
    return ExitHead(decoder, norm, linear, token_ids, rows, bits)


def _num_scored(config: ModelConfig, adapter: Adapter | None, exit_vocab: int) -> int:
    """Tokens that are scored; raises as ``build_exit_head``."""
    count = config.vocab_size if exit_vocab <= 0 else min(exit_vocab, config.vocab_size)
    if adapter is None:
        return count
    if len(adapter.norm) != config.hidden_size:
        raise ModelError(
            f"the adapter is for hidden size {len(adapter.norm)}, the model has "
            f"{config.hidden_size}: use the adapter that was trained for this model"
        )
    ranked = len(adapter.token_ids)
    if ranked and exit_vocab == 0:
        return ranked
    if ranked and ranked < count < config.vocab_size:
        raise ModelError(
            f"exit_vocab must be at most {ranked}, the tokens that the adapter ranks, or -1 for "
            f"all, got {exit_vocab}"
        )
    return count
