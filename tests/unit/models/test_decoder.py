"""The decoder against transformers: the same logits, the same tokens, in any grouping of rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from fathom.models.linear import Linear, can_pack
from fathom.models.load import load_decoder
from tests.unit.models.conftest import VARIANTS, VOCAB, greedy, logits_of, new_attention

Models = Callable[[str], tuple[transformers.PreTrainedModel, Path]]


def prompt_ids(count: int, vocab: int = VOCAB) -> list[int]:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(3)).tolist()


def reference_logits(model: transformers.PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float()


def reference_greedy(
    model: transformers.PreTrainedModel, prompt: list[int], count: int
) -> list[int]:
    with torch.no_grad():
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_greedy_tokens_equal_transformers(name: str, small_models: Models) -> None:
    model, directory = small_models(name)
    decoder = load_decoder(directory, dtype=torch.float32)
    ids = prompt_ids(30)
    expected = reference_logits(model, ids)
    torch.testing.assert_close(
        logits_of(decoder, ids), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
    )
    assert greedy(decoder, ids[:8], 64) == reference_greedy(model, ids[:8], 64)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_transformers(
    name: str, dtype: torch.dtype, small_models: Models
) -> None:
    model, directory = small_models(name)
    ids = prompt_ids(30)
    exact = reference_logits(model, ids)
    half = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    ours = logits_of(load_decoder(directory, dtype=dtype), ids)
    error = (ours - exact).pow(2).mean().sqrt()
    error_of_transformers = (reference_logits(half, ids) - exact).pow(2).mean().sqrt()
    assert error <= 1.25 * error_of_transformers


@pytest.mark.parametrize("name", ["llama-llama3-untied", "qwen2"])
def test_split_at_any_layer_equals_one_run(name: str, small_models: Models) -> None:
    _, directory = small_models(name)
    ids = prompt_ids(12)
    positions = torch.arange(12)
    whole = logits_of(load_decoder(directory, dtype=torch.float32), ids)
    for k in range(4):
        shallow = load_decoder(directory, dtype=torch.float32, layers=(0, k), head=False)
        deep = load_decoder(directory, dtype=torch.float32, layers=(k, 3), embedding=False)
        attend = new_attention(shallow)
        attend.set_rows([0] * 12, positions.tolist())
        hidden = shallow.run(shallow.embed(torch.tensor(ids)), positions, 0, k, attend)
        before = hidden.clone()
        out = deep.logits(deep.run(hidden, positions, k, 3, attend))
        torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-5)
        assert torch.equal(hidden, before)  # a stack that is flushed may be kept


def test_ragged_rows_of_many_sequences_equal_each_alone(small_models: Models) -> None:
    _, directory = small_models("qwen3")
    decoder = load_decoder(directory, dtype=torch.float32)
    sequences = [prompt_ids(9), prompt_ids(20)[5:17], prompt_ids(30)[20:21]]
    attend = new_attention(decoder)
    rows = [(s, p, t) for s, ids in enumerate(sequences) for p, t in enumerate(ids)]
    # Two passes: the first rows of every sequence, then the others, in reverse sequence order.
    passes = [[r for r in rows if r[1] < 4], sorted(r for r in rows if r[1] >= 4)[::-1]]
    passes[1].sort(key=lambda r: (-r[0], r[1]))
    for part in passes:
        attend.set_rows([r[0] for r in part], [r[1] for r in part])
        hidden = decoder.embed(torch.tensor([r[2] for r in part]))
        positions = torch.tensor([r[1] for r in part])
        logits = decoder.logits(decoder.run(hidden, positions, 0, 3, attend))
        for row, (sequence, position, _) in enumerate(part):
            alone = logits_of(decoder, sequences[sequence])[position]
            torch.testing.assert_close(logits[row], alone, rtol=1e-4, atol=1e-4)


def test_parts_that_were_not_loaded_are_named(small_models: Models) -> None:
    _, directory = small_models("llama")
    decoder = load_decoder(
        directory, dtype=torch.float32, layers=(1, 2), embedding=False, head=False
    )
    hidden = torch.zeros(1, 48)
    with pytest.raises(RuntimeError, match="without the embedding"):
        decoder.embed(torch.tensor([0]))
    with pytest.raises(RuntimeError, match="without the head"):
        decoder.logits(hidden)
    with pytest.raises(RuntimeError, match=r"layers \[0, 3\) asked of .* holds \[1, 2\)"):
        decoder.run(hidden, torch.tensor([0]), 0, 3, new_attention(decoder))


def test_parameter_counts_are_those_of_the_matrices(small_models: Models) -> None:
    model, directory = small_models("llama-biases-wide-heads")
    decoder = load_decoder(directory, dtype=torch.float32)
    matrices = [p for p in model.model.layers[0].parameters() if p.dim() == 2]
    assert decoder.layer_params == sum(p.numel() for p in matrices)
    assert decoder.head_params == model.lm_head.weight.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_linear_equals_torch(dtype: torch.dtype, bias: bool, rows: int) -> None:
    torch.manual_seed(0)
    weight, b = torch.randn(40, 24).to(dtype), torch.randn(40).to(dtype) if bias else None
    x = torch.randn(rows, 24).to(dtype)
    expected = torch.nn.functional.linear(x.float(), weight.float(), b.float() if bias else None)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]
    with torch.inference_mode():
        out = Linear(weight, b)(x)
    assert out.dtype is dtype
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)


def test_only_dtypes_with_a_packed_kernel_are_packed() -> None:
    assert not can_pack(torch.float16, torch.device("cpu"))
    assert not can_pack(torch.float32, torch.device("cuda"))
    assert can_pack(torch.float32, torch.device("cpu"))


def test_default_model_equals_transformers(default_model: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(default_model, dtype=torch.float32)
    decoder = load_decoder(default_model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(default_model)
    messages = [{"role": "user", "content": "Name three rivers of Europe."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    expected = reference_logits(model, prompt)
    torch.testing.assert_close(
        logits_of(decoder, prompt), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
    )
    assert greedy(decoder, prompt, 64) == reference_greedy(model, prompt, 64)
