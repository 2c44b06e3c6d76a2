"""Settings of an engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from fathom.attention.names import ATTENTIONS
from fathom.engine.flush_rules import FlushWhen
from fathom.models.bits import QUANTIZATIONS, Bits
from fathom.settings import ConfigError
from fathom.types import ComputePolicy, InvalidRequest

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """One engine: a model split at its exit layer, with a KV pool for each stage.

    Attributes:
        model: hub name, directory in Hugging Face form, or GGUF file.
        dtype: of weights, activations and KV blocks.
        quantization: bits of the layers' weights: ``none`` (those of ``dtype``), ``int8`` or
            ``int4``; or of each stage, ``SHALLOW:DEEP``. LM head and exit head of a quantized
            stage have 8. By our kernels on a CPU; on a GPU torch unpacks them, which saves
            memory and no time.
        device: a torch device string.
        attention: what computes attention: ``kernel`` (our own, on a CPU), ``sdpa`` or ``flex``
            (torch's, everywhere), ``flashinfer`` (on an NVIDIA GPU); ``auto`` takes the fastest of
            kernel, flashinfer and sdpa that runs here.
        cuda_graphs: on a GPU, passes of up to 128 rows are captured and replayed.
        compile: torch compiles what layers do around attention, at first use. For GPUs: on a CPU
            our own kernels or oneDNN's run them, which it cannot compile (but for float16).
        threads: torch intra-op threads of this process; 0 leaves torch's setting.
        adapter: what was trained for early exits: ``auto`` (the default that ships for this
            model, else none), ``none`` (the model's own norm and LM head), the name of one that
            ships, or a path.
        exit_layer: k, the number of shallow layers; 0 takes the adapter's, or a third of the
            model's layers where there is none.
        exit_vocab: size of the frequency-ranked subset of the vocabulary that the exit head
            scores; 0 takes the adapter's choice, -1 forces the whole vocabulary.
        meta: file of a trained classifier for the confidence ``meta``; empty for none.
        block_size: tokens a KV block.
        kv_cache_bytes: bytes of both stages' KV pools together.
        max_num_seqs: most sequences that run at once.
        max_num_batched_tokens: most rows of one shallow or deep pass.
        max_model_len: longest prompt + completion in tokens; 0 takes the model's.
        prefix_caching: reuse the KV blocks of equal prefixes.
        pause_drafting: a mode goes to full depth while drafting does not pay, by the stages'
            measured costs and the exits' rates; under the policies ``threshold`` and
            ``adaptive``. Depths depend on the load then, and in ``rollback`` and ``free`` tokens
            too: meanwhile they are the full model's. In ``exact`` they always are.
        flush_rule: when sequences that wait get the deep stage: ``rate`` (when that makes more
            tokens a second than drafting on, at measured costs), ``full`` (when none can draft any
            more), or ``eager`` (as soon as one waits).
        compute: the compute policy of requests that do not say.
    """

    model: str = DEFAULT_MODEL
    dtype: str = "bfloat16"
    quantization: str = "none"
    device: str = "cpu"
    attention: str = "auto"
    cuda_graphs: bool = True
    compile: bool = False
    threads: int = 0
    adapter: str = "auto"
    exit_layer: int = 0
    exit_vocab: int = 0
    meta: str = ""
    block_size: int = 16
    kv_cache_bytes: int = 1 << 30
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 512
    max_model_len: int = 0
    prefix_caching: bool = True
    pause_drafting: bool = True
    flush_rule: FlushWhen = FlushWhen.RATE
    compute: ComputePolicy = field(default_factory=ComputePolicy)

    def validate(self) -> None:
        """Check every field.

        Raises:
            ConfigError: naming the first field out of range, its value and the remedy.
        """
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        self._check_quantization()
        self._check_attention()
        if self.flush_rule not in list(FlushWhen):
            raise ConfigError(
                f"flush_rule must be one of {', '.join(FlushWhen)}, got {self.flush_rule!r}."
            )
        for name, low in (
            ("threads", 0),
            ("exit_layer", 0),
            ("exit_vocab", -1),
            ("block_size", 1),
            ("kv_cache_bytes", 1),
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("max_model_len", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(f"{name} must be an integer of at least {low}, got {value!r}.")
        if self.max_num_batched_tokens < self.compute.max_stack + 1:
            raise ConfigError(
                "max_num_batched_tokens must exceed compute.max_stack "
                f"({self.compute.max_stack}), got {self.max_num_batched_tokens}."
            )
        try:
            self.compute.validate()
        except InvalidRequest as error:
            raise ConfigError(f"compute.{error}") from error

    @property
    def bits(self) -> Bits:
        """What ``quantization`` says."""
        return Bits.parse(self.quantization)

    def _check_attention(self) -> None:
        """What is known before the model is: the rest is told where the stages are built."""
        if self.attention not in ATTENTIONS:
            raise ConfigError(
                f"attention must be one of {', '.join(ATTENTIONS)}, got {self.attention!r}."
            )
        needs = {"kernel": "cpu", "flashinfer": "cuda"}.get(self.attention)
        if needs is not None and self.device.split(":")[0] != needs:
            raise ConfigError(
                f"attention {self.attention!r} needs device {needs}, and device is "
                f"{self.device!r}: leave one of them out."
            )
        if self.attention == "flashinfer" and self.dtype == "float32":
            raise ConfigError(
                "attention 'flashinfer' needs dtype bfloat16 or float16, got float32: leave it "
                "out, or take sdpa."
            )

    def _check_quantization(self) -> None:
        try:
            bits = self.bits
        except ValueError:
            raise ConfigError(
                f"quantization must be {', '.join(QUANTIZATIONS)}, or SHALLOW:DEEP of these, got "
                f"{self.quantization!r}."
            ) from None
        if bits == (0, 0):
            return
        if self.dtype == "float16" and self.device == "cpu":
            raise ConfigError(
                f"quantization {self.quantization!r} goes with dtype bfloat16 or float32 on a CPU, "
                "got float16."
            )
