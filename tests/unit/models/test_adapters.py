"""An adapter's file: written whole, read back, refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fathom.models.adapters import Adapter, find_adapter, packaged_adapters, read_adapter
from fathom.models.errors import ModelError
from fathom.models.load import load_decoder, load_exit_layers
from tests.unit.models.conftest import logits_of


def adapter(**changes) -> Adapter:
    fields = {
        "exit_layer": 2,
        "norm": torch.ones(48),
        "token_ids": torch.tensor([5, 3, 9]),
        "metadata": {"name": "a", "model": "m", "weights_digest": "d"},
    }
    return Adapter(**{**fields, **changes})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    layers = {"2.mlp.up_proj.weight": torch.randn(4, 3), "3.input_layernorm.weight": torch.ones(3)}
    name = "model.layers.1.self_attn.q_proj.weight"
    written = adapter(
        exit_layers=2,
        head_adapter=torch.randn(48, 48),
        layers=layers,
        lora={name: (torch.randn(2, 3), torch.randn(4, 2))},
    )
    file = written.write(tmp_path / "a")
    for path in (file, file.parent):
        read = read_adapter(path)
        assert (read.exit_layer, read.exit_layers, read.changes_model) == (2, 2, True)
        assert read.token_ids.tolist() == [5, 3, 9]
        assert torch.equal(read.head_adapter, written.head_adapter)
        assert set(read.layers) == set(layers)
        assert all(torch.equal(read.layers[key], value) for key, value in layers.items())
        assert all(map(torch.equal, read.lora[name], written.lora[name]))
        assert read.metadata["model"] == "m"
        assert len(read.digest) == 64
    assert not list(file.parent.glob("*.partial"))
    assert file.stat().st_mode & 0o044


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.safetensors: cannot read the adapter"):
        read_adapter(tmp_path / "none.safetensors")
    damaged = tmp_path / "adapter.safetensors"
    damaged.write_bytes(b"no")
    with pytest.raises(ModelError, match=r"adapter\.safetensors: cannot read the adapter"):
        read_adapter(tmp_path)
    save_file({"head.norm": torch.ones(2)}, damaged, {"format_version": "1"})
    with pytest.raises(ModelError, match=r"format '1'; this version .* '2'. Train it again"):
        read_adapter(damaged)
    save_file({"head.norm": torch.ones(2)}, damaged, {"format_version": "2"})
    with pytest.raises(ModelError, match="exit_layer"):
        read_adapter(damaged)


def test_names_of_adapters(tmp_path: Path) -> None:
    assert find_adapter("none", "m", "d") is None
    assert find_adapter("auto", "some/other-model", "no digest") is None
    with pytest.raises(ModelError, match=r"adapter 'nope': no such file .* ships with Fathom"):
        find_adapter("nope", "m", "d")
    path = adapter().write(tmp_path)
    assert find_adapter(str(path), "m", "d").metadata["name"] == "a"
    for name in packaged_adapters():
        shipped = find_adapter(name, "m", "d")
        model, digest = shipped.metadata["model"], shipped.metadata["weights_digest"]
        if name.startswith("default"):
            assert find_adapter("auto", model, "x").digest == shipped.digest
            assert find_adapter("auto", "x", digest).digest == shipped.digest


def test_shipped_adapters_are_small_and_have_cards() -> None:
    assert packaged_adapters()
    for folder in packaged_adapters().values():
        assert (folder / "adapter.safetensors").stat().st_size <= 25 << 20
        card = (folder / "README.md").read_text()
        assert "fathom train exits" in card
        assert "Limits" in card


def test_low_rank_changes_are_added_to_the_weights(small_models) -> None:
    model, directory = small_models("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    a, b = torch.randn(3, 80), torch.randn(48, 3)
    decoder = load_decoder(directory, dtype=torch.float32, adapter=adapter(lora={name: (a, b)}))
    before = logits_of(load_decoder(directory, dtype=torch.float32), [1, 2, 3])
    weight = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight += b @ a
        expected = model(torch.tensor([[1, 2, 3]])).logits[0]
        weight -= b @ a
    changed = logits_of(decoder, [1, 2, 3])
    torch.testing.assert_close(changed, expected, rtol=1e-3, atol=1e-3)
    assert (changed - before).abs().max() > 0.1


def test_an_adapter_of_another_model_is_refused(small_models) -> None:
    _, directory = small_models("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    wrong = adapter(lora={name: (torch.randn(3, 8), torch.randn(48, 3))})
    with pytest.raises(ModelError, match=r"calls for \[48, 80\]: use the adapter that was trained"):
        load_decoder(directory, dtype=torch.float32, adapter=wrong)
    decoder = load_decoder(directory, dtype=torch.float32)
    missing = adapter(exit_layers=1, layers={"2.input_layernorm.weight": torch.ones(47)})
    with pytest.raises(ModelError, match=r"input_layernorm.weight' is of shape \[47\]"):
        load_exit_layers(decoder, missing)


@pytest.mark.parametrize("name", ["default", "multi30k", "scitldr"])
def test_what_ships_is_small_can_be_read_and_has_a_card(name: str) -> None:
    folder = packaged_adapters()[name]
    file = folder / "adapter.safetensors"
    assert file.stat().st_size <= 25e6
    shipped = read_adapter(folder)
    assert shipped.metadata["name"] == name
    assert shipped.changes_model == (name != "default")  # the default's full path is the base's
    card = (folder / "README.md").read_text()
    for word in ("fathom train exits", "## Data", "## Held out", "## Limits"):
        assert word in card
