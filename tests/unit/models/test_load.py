"""Finding models, and what is said about those that are missing, damaged or unsupported."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fathom.models.config import ModelConfig
from fathom.models.errors import ModelError
from fathom.models.load import load_decoder, resolve_model, weights_digest
from fathom.models.weights import WeightFiles


@pytest.fixture
def model(small_models: Any, tmp_path: Path) -> Path:
    """A copy of a small model that a test may damage."""
    directory = tmp_path / "model"
    shutil.copytree(small_models("llama-llama3-untied")[1], directory)
    return directory


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def load(directory: Path) -> Any:
    return load_decoder(directory, dtype=torch.float32)


def test_config_holds_the_models_shape(small_models: Any) -> None:
    config = ModelConfig.from_directory(small_models("qwen3-linear-bias")[1])
    assert config.architecture == "Qwen3ForCausalLM"
    assert (config.hidden_size, config.num_layers, config.num_heads) == (48, 3, 4)
    assert (config.num_kv_heads, config.head_dim) == (2, 24)
    assert config.qkv_bias and config.output_bias and config.qk_norm and not config.mlp_bias
    assert (config.eos_token_ids, config.bos_token_id) == ((2,), 1)
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(pickle.loads(pickle.dumps(config)))


def test_a_config_is_read_again_only_when_it_has_changed(model: Path, cache: Path) -> None:
    first = ModelConfig.from_directory(model)
    (note,) = (cache / "configs").iterdir()
    assert ModelConfig.from_directory(model) == first
    note.write_text(json.dumps(json.loads(note.read_text()) | {"num_layers": 99}))
    assert ModelConfig.from_directory(model).num_layers == 99
    note.write_text("")  # as a crash may leave it
    assert ModelConfig.from_directory(model) == first
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert 7 in ModelConfig.from_directory(model).eos_token_ids
    edit(model / "config.json", rope_parameters={"rope_type": "magic", "rope_theta": 1e4})
    for _ in range(2):  # what cannot be read is not remembered
        with pytest.raises(ModelError, match="magic"):
            ModelConfig.from_directory(model)
    assert len(list((cache / "configs").iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "longest"),
    [("llama", 256), ("mistral", 256), ("mistral-window", 100), ("llama-longrope", 128)],
)
def test_max_position_is_the_length_up_to_which_it_is_exact(
    name: str, longest: int, small_models: Any
) -> None:
    assert ModelConfig.from_directory(small_models(name)[1]).max_position == longest


def test_qwen_window_counts_only_where_layers_use_it(small_models: Any, tmp_path: Path) -> None:
    directory = tmp_path / "qwen"
    shutil.copytree(small_models("qwen2")[1], directory)
    assert ModelConfig.from_directory(directory).sliding_window is None
    changes = {"use_sliding_window": True, "sliding_window": 32, "layer_types": None}
    edit(directory / "config.json", **changes, max_window_layers=99)
    assert ModelConfig.from_directory(directory).max_position == 256
    edit(directory / "config.json", **changes, max_window_layers=1)
    assert ModelConfig.from_directory(directory).max_position == 32


def test_eos_ids_come_from_both_files(model: Path) -> None:
    edit(model / "config.json", eos_token_id=[2, 7])
    (model / "generation_config.json").write_text('{"eos_token_id": [9, 7]}')
    assert ModelConfig.from_directory(model).eos_token_ids == (2, 7, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
            "unsupported architecture 'GPT2LMHeadModel'; supported: LlamaForCausalLM, Mistral",
        ),
        ({"architectures": None, "model_type": "gpt2"}, "unsupported architecture 'gpt2'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized checkpoint .*'awq'"),
        ({"hidden_act": "gelu"}, "unsupported hidden_act 'gelu'"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "unsupported rope_type 'spiral'"),
        ({"hidden_size": "wide"}, "invalid LlamaForCausalLM configuration"),
    ],
)
def test_unsupported_settings_are_named(changes: dict[str, Any], message: str, model: Path) -> None:
    edit(model / "config.json", **changes)
    with pytest.raises(ModelError, match=message) as caught:
        load(model)
    assert "config.json" in str(caught.value)


def rewrite(model: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")


def test_missing_and_damaged_files_are_named(model: Path, tmp_path: Path) -> None:
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 5, 300, len(whole) - 10):
        weights.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"model\.safetensors: damaged safetensors file"):
            load(model)
    weights.unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors: missing weights file"):
        load(model)
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "shard-1.safe"}}')
    with pytest.raises(ModelError, match=r"shard-1\.safe: missing weights file"):
        load(model)
    (model / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match=r"index\.json: damaged: no weight_map"):
        load(model)
    (model / "config.json").write_text('{"model_type": ')
    with pytest.raises(ModelError, match=r"config\.json: damaged: not valid JSON"):
        load(model)
    (model / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"config\.json: damaged: expected a JSON object"):
        load(model)
    (model / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json: cannot read: No such file"):
        load(model)


def test_missing_misshapen_and_integer_tensors_are_named(model: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    whole = load_file(model / "model.safetensors")
    rewrite(model, lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=f"missing tensor '{name}'"):
        load(model)
    rewrite(model, lambda tensors: tensors.update({name: whole[name][:-1].clone()}))
    with pytest.raises(ModelError, match=rf"'{name}' has shape \[23, 48\].* calls for \[24, 48\]"):
        load(model)
    rewrite(model, lambda tensors: tensors.update({name: whole[name].to(torch.int8)}))
    with pytest.raises(ModelError, match=rf"'{name}' has type torch\.int8; supported are float32"):
        load(model)


def test_layers_outside_the_model_are_refused(model: Path) -> None:
    for layers in ((0, 4), (-1, 2), (2, 1)):
        with pytest.raises(ModelError, match="the model has 3"):
            load_decoder(model, dtype=torch.float32, layers=layers)


def test_weights_own_their_memory(model: Path) -> None:
    """A file that changes after loading must not change the model."""
    tensor = WeightFiles(model).tensor("model.norm.weight", (48,), torch.float32)
    before = tensor.clone()
    with (model / "model.safetensors").open("r+b") as stream:
        stream.seek(5000)
        stream.write(b"\xff" * (model / "model.safetensors").stat().st_size)
    assert torch.equal(tensor, before)


def test_digest_is_that_of_the_file_and_is_remembered(model: Path, cache: Path) -> None:
    weights = model / "model.safetensors"
    expected = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert weights_digest(model) == expected
    (note,) = (cache / "digests").iterdir()
    note.write_text("remembered")
    assert weights_digest(model) == "remembered"
    rewrite(model, lambda tensors: tensors["model.norm.weight"].mul_(2))
    assert weights_digest(model) == hashlib.sha256(weights.read_bytes()).hexdigest() != expected


def test_digest_without_a_cache_that_can_be_written(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FATHOM_CACHE", str(model / "config.json"))  # a file, not a directory
    assert len(weights_digest(model)) == 64


def test_resolve_takes_a_directory(model: Path) -> None:
    assert resolve_model(str(model)) == model.resolve()


def test_resolve_offline_says_what_to_run(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fathom.models.resolve.is_offline_mode", lambda: True)
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE .* `fathom pull nobody/nothing`"):
        resolve_model("nobody/nothing")
    with pytest.raises(ModelError, match="no such directory or GGUF file"):
        resolve_model("./no/such/directory")


def test_resolve_finds_what_the_cache_holds(cache: Path) -> None:
    directory = cache / "models" / "nobody--nothing"
    directory.mkdir(parents=True)
    assert resolve_model("nobody/nothing") == directory


def test_digest_covers_weights_and_not_settings(model: Path, cache: Path) -> None:
    before = weights_digest(model)
    edit(model / "config.json", rms_norm_eps=0.5)
    assert weights_digest(model) == before
