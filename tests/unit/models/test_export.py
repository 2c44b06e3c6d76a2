"""What is exported as a draft model drafts what the exit head does, in another library's hands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from fathom.models.adapters import Adapter, packaged_adapters, read_adapter
from fathom.models.errors import ModelError
from fathom.models.export_files import export
from fathom.models.export_vocab import UNKNOWN, choose_tokens
from fathom.models.heads import build_exit_head
from fathom.models.load import load_decoder, load_exit_layers
from fathom.models.tokenizer import load_tokenizer
from tests.tiny_models import save_byte_tokenizer
from tests.unit.models.conftest import SMALL, build_model, new_attention

SCORED = [5, 3, 9, 60, 2, 41, 96, 7, 30, 12]
PROMPT = [7, 3, 90, 41, 2, 5, 11, 64, 9, 60, 33, 1]


def adapter_for(directory: Path, *, exit_layers: int = 2, linear: bool = True) -> Adapter:
    """A random adapter of exit layer 1, its layers with whatever tensors the model's have."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    layers = {
        f"{1 + i}.{name}": tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for i in range(exit_layers)
        for name, tensor in model.model.layers[2].state_dict().items()
    }
    width = SMALL["hidden_size"]
    return Adapter(
        exit_layer=1,
        exit_layers=exit_layers,
        norm=torch.rand(width, generator=generator) + 0.5,
        head_adapter=torch.randn(width, width, generator=generator) * 0.3 if linear else None,
        token_ids=torch.tensor(SCORED),
        layers=layers,
        metadata={"name": "a"},
    )


def drafts(directory: Path, adapter: Adapter | None, ids: list[int], exit_layer: int) -> Tensor:
    """Our own exit head's logits [rows, V] after each token of a text, -inf where not scored."""
    decoder = load_decoder(directory, dtype=torch.float32)
    head = build_exit_head(decoder, directory, adapter, 0)
    attention, positions = new_attention(decoder), torch.arange(len(ids))
    attention.set_rows([0] * len(ids), positions.tolist())
    hidden = decoder.run(decoder.embed(torch.tensor(ids)), positions, 0, exit_layer, attention)
    extra = load_exit_layers(decoder, adapter) if adapter else None
    if extra is not None:
        attention.set_rows([1] * len(ids), positions.tolist())
        hidden = extra.run(hidden, positions, extra.first, extra.last, attention)
    return torch.stack([head.spread(row) for row in head.logits(hidden)])


def theirs(directory: Path, ids: list[int]) -> Tensor:
    """transformers' logits [rows, V] of a checkpoint; every weight in it must be used."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def assert_same_choice(found: Tensor, ours: Tensor) -> None:
    """The same best token in every row among those that our head scores."""
    scored = torch.isfinite(ours[0])
    masked = found.masked_fill(~scored, float("-inf"))
    assert masked.argmax(-1).tolist() == ours.argmax(-1).tolist()
    assert len(set(ours.argmax(-1).tolist())) > 2  # else nothing would be compared


@pytest.mark.parametrize("name", ["llama", "llama-biases-wide-heads", "mistral", "qwen2", "qwen3"])
def test_transformers_drafts_as_the_exit_head(small_models, tmp_path: Path, name: str) -> None:
    _, directory = small_models(name)
    adapter = adapter_for(directory)
    out = tmp_path / "draft"
    export(directory, adapter, out, exit_layer=1, dtype="float32")
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 3
    assert_same_choice(theirs(out, PROMPT), drafts(directory, adapter, PROMPT, 1))
    assert not (out / "target").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


def test_the_linear_map_matters(small_models, tmp_path: Path) -> None:
    """Else the tests above would pass without folding it in."""
    _, directory = small_models("llama")
    adapter = adapter_for(directory)
    plain = adapter_for(directory, linear=False)
    export(directory, plain, tmp_path / "draft", exit_layer=1, dtype="float32")
    found = theirs(tmp_path / "draft", PROMPT)
    assert_same_choice(found, drafts(directory, plain, PROMPT, 1))
    with pytest.raises(AssertionError):
        assert_same_choice(found, drafts(directory, adapter, PROMPT, 1))


@pytest.mark.parametrize("name", ["llama", "llama-llama3-untied"])
def test_without_an_adapter_it_is_an_early_exit(small_models, tmp_path: Path, name: str) -> None:
    _, directory = small_models(name)
    export(directory, None, tmp_path / "draft", exit_layer=2, dtype="float32")
    found, ours = theirs(tmp_path / "draft", PROMPT), drafts(directory, None, PROMPT, 2)
    torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-4)


def test_fewer_tokens(tmp_path: Path) -> None:
    """Kept tokens are spelled as before, and the draft chooses among them as the exit head does."""
    directory = save_byte_tokenizer(tmp_path / "model")
    changes = {"vocab_size": 257, "tie_word_embeddings": True, "bos_token_id": None}
    build_model(transformers.LlamaConfig, {**changes, "eos_token_id": 256}).save_pretrained(
        directory
    )
    adapter = adapter_for(directory)
    notes = export(directory, adapter, tmp_path / "d", exit_layer=1, vocab=40, dtype="float32")
    assert notes["speculative_config"]["use_heterogeneous_vocab"] is True
    tokenizer = load_tokenizer(directory)
    kept = choose_tokens(adapter.token_ids, tokenizer, 40)
    written = tokenizer.encode("<|user|>\n<|assistant|>")  # by the template, whatever is said
    assert kept[0] == 256
    assert set(written) <= set(kept[: len(set(written)) + 1])
    rest = [token for token in SCORED if token not in written]
    assert kept[len(set(written)) + 1 :][: len(rest)] == rest
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert (config["vocab_size"], config["eos_token_id"], config["bos_token_id"]) == (41, 0, None)

    names = load_tokenizer(tmp_path / "d").hf.get_vocab()
    theirs_of = {target: names[name] for name, target in tokenizer.hf.get_vocab().items()
                 if name in names}  # fmt: skip
    assert theirs_of == {token: index for index, token in enumerate(kept)}
    assert names[UNKNOWN] == 40

    ids = [7, 3, 9, 41, 2, 5, 11, 4, 9, 60, 30, 1]  # kept ones alone: nothing is unknown
    assert set(ids) <= set(kept)
    found = theirs(tmp_path / "d", [kept.index(token) for token in ids])[:, :40]
    whole = found.new_full((len(ids), 257), float("-inf"))
    whole[:, kept] = found
    assert_same_choice(whole, drafts(directory, adapter, ids, 1))
    assert theirs(tmp_path / "d", [40, 40]).isfinite().all()


def test_what_cannot_be_exported_is_said(small_models, tmp_path: Path) -> None:
    _, directory = small_models("llama")
    adapter = adapter_for(directory)
    out = tmp_path / "draft"

    def fails(reason: str, adapter: Adapter | None, exit_layer: int = 1, **options: int) -> None:
        with pytest.raises(ModelError, match=reason):
            export(directory, adapter, out, exit_layer=exit_layer, **options)
        assert not list(tmp_path.iterdir())

    changed = Adapter(
        exit_layer=1, norm=adapter.norm, token_ids=adapter.token_ids,
        lora={"model.layers.0.mlp.up_proj.weight": (torch.ones(1, 48), torch.ones(80, 1))},
    )  # fmt: skip
    fails(r"changes the model's own layers \(LoRA\).*--tune exit", changed)
    fails("exit_layer must be 1, where the adapter was trained to exit, got 2", adapter, 2)
    fails("exit_layer must be from 1 to 2", None, 3)
    narrow = Adapter(exit_layer=1, norm=torch.ones(47), token_ids=torch.arange(0))
    fails("hidden size 47, the model has 48", narrow)
    partly = Adapter(
        exit_layer=1, exit_layers=1, norm=adapter.norm, token_ids=adapter.token_ids,
        layers={"1.input_layernorm.weight": torch.ones(48)},
    )  # fmt: skip
    fails(r"'model\.layers\.1\.\S+' is missing; .* trained for this model", partly)
    fails("cannot load the tokenizer", adapter, vocab=20)
    out.mkdir()
    (out / "mine").write_text("")
    with pytest.raises(ModelError, match="not an empty folder"):
        export(directory, adapter, out, exit_layer=1)
    assert (out / "mine").exists()


@pytest.mark.slow
def test_the_default_adapters_draft_and_target(default_model: Path, tmp_path: Path) -> None:
    adapter = read_adapter(packaged_adapters()["default"])
    out = tmp_path / "draft"
    notes = export(default_model, adapter, out, exit_layer=5, dtype="float32")
    tokenizer = load_tokenizer(default_model)
    chat = [{"role": "user", "content": "A baker sells 12 rolls at 2 dollars each. How much?"}]
    ids = tokenizer.apply_chat_template(chat) + tokenizer.encode("The baker sells 12 rolls")
    found, ours = theirs(out, ids), drafts(default_model, adapter, ids, 5)
    assert_same_choice(found, ours)
    assert load_tokenizer(out).encode("12 rolls") == tokenizer.encode("12 rolls")
    target = Path(notes["target"])
    if target != default_model:  # it was converted from a GGUF file
        torch.testing.assert_close(theirs(target, ids), theirs(default_model, ids))
