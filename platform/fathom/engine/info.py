"""What an engine runs, as others need to know it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine runs.

    Attributes:
        model: as configured. adapter: its name, empty for none; adapter_digest: sha256 of its
            file, empty for none. num_layers: L.
        exit_layer: k, where the stages part. exit_depth: layers behind a drafted token, the
            shallow stage's own exit layers included.
        exit_vocab: tokens that the exit head scores. num_blocks: KV blocks of each stage.
        block_size: tokens a block. quantization: as ``EngineConfig.quantization``.
        attention: the backend that runs, out of ``fathom.attention.names.ATTENTIONS``.
    """

    model: str
    adapter: str
    adapter_digest: str
    num_layers: int
    exit_layer: int
    exit_depth: int
    exit_vocab: int
    vocab_size: int
    max_model_len: int
    dtype: str
    eos_token_ids: tuple[int, ...]
    weights_digest: str
    num_blocks: int
    block_size: int
    quantization: str = "none"
    attention: str = ""

    @property
    def exit_identity(self) -> str:
        """Equal for engines whose confidences mean the same: equal weights, equal exit."""
        parts = (
            self.weights_digest,
            self.adapter_digest,
            self.exit_layer,
            self.exit_vocab,
            self.dtype,
        )
        return " ".join(map(str, parts))
