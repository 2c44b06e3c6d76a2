"""GGUF files: small ones written here, converted, and compared with transformers."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from fathom.models.cache import build_directory
from fathom.models.config import ModelConfig
from fathom.models.errors import ModelError
from fathom.models.gguf import _GLOBAL_NAMES, _LAYER_NAMES, convert_gguf
from fathom.models.load import load_decoder, resolve_model
from fathom.models.tokenizer import load_tokenizer
from fathom.models.weights import WeightFiles
from tests.unit.models.conftest import build_model, logits_of

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
KINDS = {
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": False}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {"tie_word_embeddings": True, "head_dim": 32}),
}
FAMILY = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
Q8_0, Q4_1, F16, F32 = (
    gguf.GGMLQuantizationType.Q8_0,
    gguf.GGMLQuantizationType.Q4_1,
    gguf.GGMLQuantizationType.F16,
    gguf.GGMLQuantizationType.F32,
)


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of Q and K rows (convert_hf_to_gguf.py)."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def tokens() -> list[str]:
    """A byte-level vocabulary: three special tokens, the 256 bytes, one merge, fillers."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "ab"]
    return words + [f"<filler{i}>" for i in range(SHAPE["vocab_size"] - len(words))]


def write_gguf(
    file: Path,
    architecture: str,
    kind: gguf.GGMLQuantizationType = F32,
    rope_factors: np.ndarray | None = None,
    extra_tensor: str | None = None,
    eot: int | None = None,
) -> transformers.PreTrainedModel:
    """Write a random model as llama.cpp's converter would; returns it in transformers' form."""
    config_class, changes = KINDS[architecture]
    model = build_model(config_class, {**SHAPE, **changes})
    config = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("Small")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    if architecture == "llama":
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_vocab_size(config.vocab_size)
    if architecture == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    words = tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3] * 3 + [1] * (len(words) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if eot is not None:
        writer.add_eot_token_id(eot)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    gguf_names = {hf: name for name, hf in _GLOBAL_NAMES.items()}
    parts = {hf: name for name, hf in _LAYER_NAMES.items()}
    for hf_name, tensor in model.state_dict().items():
        if hf_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if hf_name in gguf_names:
            name = gguf_names[hf_name]
        else:
            layer, rest = hf_name.removeprefix("model.layers.").split(".", 1)
            part, suffix = rest.rsplit(".", 1)
            name = f"blk.{layer}.{parts[part]}.{suffix}"
            if architecture == "llama" and parts[part] in ("attn_q", "attn_k"):
                q = parts[part] == "attn_q"
                heads = config.num_attention_heads if q else config.num_key_value_heads
                values = permute(values, heads)
        type_ = kind if values.ndim == 2 else F32
        writer.add_tensor(name, gguf.quantize(values, type_), raw_dtype=type_)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors)
    if extra_tensor is not None:
        writer.add_tensor(extra_tensor, np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 50000.0}
    model.config.rms_norm_eps = 1e-5
    return model


@pytest.mark.parametrize("architecture", KINDS)
def test_conversion_computes_what_the_original_computes(
    architecture: str, tmp_path: Path, cache: Path
) -> None:
    original = write_gguf(tmp_path / "m.gguf", architecture)
    weights = original.state_dict()
    original = transformers.AutoModelForCausalLM.from_config(original.config).eval()
    original.load_state_dict(weights)
    directory = resolve_model(str(tmp_path / "m.gguf"))
    ids = [5, 17, 250, 3, 99]
    with torch.no_grad():
        expected = original(torch.tensor([ids])).logits[0]
    got = logits_of(load_decoder(directory, dtype=torch.float32), ids)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    assert resolve_model(str(tmp_path / "m.gguf")) == directory  # converted once
    assert transformers.AutoModelForCausalLM.from_pretrained(directory).config.eos_token_id == 2


@pytest.mark.parametrize("kind", [Q8_0, Q4_1, F16], ids=lambda kind: kind.name)
def test_weights_are_exactly_those_of_transformers(
    kind: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", kind)
    directory = tmp_path / "converted"
    directory.mkdir()
    convert_gguf(tmp_path / "m.gguf", directory, progress=False)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    converted = load_file(directory / "model.safetensors")
    assert converted.keys() == oracle.state_dict().keys()
    for name, tensor in oracle.state_dict().items():
        assert torch.equal(converted[name], tensor), name
    ours = ModelConfig.from_directory(directory)
    assert ours.rms_norm_eps == oracle.config.rms_norm_eps
    assert ours.eos_token_ids == (2,) and ours.bos_token_id == 1
    assert ours.max_position == oracle.config.max_position_embeddings


def test_tokenizer_keeps_its_chat_template(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama")
    tokenizer = load_tokenizer(resolve_model(str(tmp_path / "m.gguf")))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "ab é"}])
    assert tokenizer.decode(ids) == "ab é"
    assert tokens().index("ab") in ids


def test_end_of_turn_ends_a_sequence_too(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "llama", eot=0)
    directory = resolve_model(str(tmp_path / "m.gguf"))
    assert ModelConfig.from_directory(directory).eos_token_ids == (2, 0)


def test_rope_factors_of_llama_3_divide_the_frequencies(tmp_path: Path, cache: Path) -> None:
    factors = np.array([1, 1, 1, 1.5, 2, 4, 8, 8], np.float32)
    write_gguf(tmp_path / "plain.gguf", "llama")
    write_gguf(tmp_path / "scaled.gguf", "llama", rope_factors=factors)
    plain, scaled = (
        ModelConfig.from_directory(resolve_model(str(tmp_path / f"{name}.gguf")))
        for name in ("plain", "scaled")
    )
    np.testing.assert_allclose(
        np.array(plain.rope_inv_freq) / factors, scaled.rope_inv_freq, rtol=1e-6
    )
    assert scaled.rope_attention_scaling == 1.0
    assert scaled.max_position == plain.max_position


def test_large_models_are_written_in_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "m.gguf", "llama")
    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir(), many.mkdir()
    convert_gguf(tmp_path / "m.gguf", one, progress=False)
    monkeypatch.setattr("fathom.models.gguf._SHARD_BYTES", 50_000)
    convert_gguf(tmp_path / "m.gguf", many, progress=False)
    assert len(list(many.glob("*.safetensors"))) > 3
    files = WeightFiles(many)
    for name, tensor in load_file(one / "model.safetensors").items():
        assert torch.equal(files.tensor(name, tuple(tensor.shape), torch.float32), tensor)
    assert torch.equal(
        logits_of(load_decoder(many, dtype=torch.float32), [1, 2]),
        logits_of(load_decoder(one, dtype=torch.float32), [1, 2]),
    )


def test_unsupported_and_damaged_files_are_named(tmp_path: Path, cache: Path) -> None:
    foreign = gguf.GGUFWriter(tmp_path / "mamba.gguf", "mamba")
    foreign.write_header_to_file()
    foreign.write_kv_data_to_file()
    foreign.close()
    with pytest.raises(ModelError, match="unsupported GGUF architecture 'mamba'; supported: llama"):
        resolve_model(str(tmp_path / "mamba.gguf"))

    write_gguf(tmp_path / "moe.gguf", "llama", extra_tensor="blk.0.ffn_gate_inp.weight")
    with pytest.raises(ModelError, match=r"unsupported tensor 'blk\.0\.ffn_gate_inp\.weight'"):
        resolve_model(str(tmp_path / "moe.gguf"))

    with pytest.raises(ModelError, match=r"absent\.gguf: cannot read"):
        resolve_model(str(tmp_path / "absent.gguf"))

    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(ModelError, match=r"text\.gguf: missing or damaged GGUF file"):
        resolve_model(str(tmp_path / "text.gguf"))

    write_gguf(tmp_path / "whole.gguf", "llama")
    data = (tmp_path / "whole.gguf").read_bytes()
    for size in (100, 2000, len(data) // 2, len(data) - 100):
        cut = tmp_path / f"cut{size}.gguf"
        cut.write_bytes(data[:size])
        with pytest.raises(ModelError, match=cut.name):
            resolve_model(str(cut))
    # None of these failures has left a directory that a later call would take for a model.
    assert [path for path in (cache / "gguf").iterdir() if path.is_dir()] == []


def _build_slowly(final: Path, builds: multiprocessing.Queue) -> None:
    def build(directory: Path) -> None:
        builds.put(1)
        (directory / "a").write_text("a")
        multiprocessing.Event().wait(0.3)
        (directory / "b").write_text("b")

    build_directory(final, build)
    assert (final / "b").exists()


def test_processes_that_build_at_the_same_time_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    builds = context.Queue()
    workers = [
        context.Process(target=_build_slowly, args=(tmp_path / "x" / "model", builds))
        for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert builds.get(timeout=5) == 1 and builds.empty()


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(directory: Path) -> None:
        (directory / "half").write_text("half")
        raise KeyboardInterrupt

    final = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        build_directory(final, interrupted)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    # A process killed outright leaves its partial directory; the next build starts afresh.
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "stale").write_text("stale")
    build_directory(final, lambda directory: (directory / "new").touch())
    assert [path.name for path in final.iterdir()] == ["new"]
