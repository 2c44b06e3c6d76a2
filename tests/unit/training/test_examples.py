"""Which rows are trained on, and in which order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.models.tokenizer import load_tokenizer
from fathom.training.errors import TrainingError
from fathom.training.examples import IGNORED, Batch, Example, groups_of_epoch, read_examples


def test_labels_are_the_next_tokens_of_the_target() -> None:
    batch = Batch.of([Example((1, 2, 3, 4), 2), Example((5, 6, 7, 8, 9, 10), 5)])
    assert batch.token_ids.tolist() == [[1, 2, 3, 0, 0], [5, 6, 7, 8, 9]]
    assert batch.labels.tolist() == [
        [IGNORED, 3, 4, IGNORED, IGNORED],
        [IGNORED, IGNORED, IGNORED, IGNORED, 10],
    ]
    assert batch.num_targets == 3


@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=60),
    max_tokens=st.integers(10, 200),
    epoch=st.integers(0, 3),
)
def test_an_epoch_sees_every_example_once_within_the_bound(
    lengths: list[int], max_tokens: int, epoch: int
) -> None:
    examples = [Example(tuple(range(n)), 1) for n in lengths]
    groups = groups_of_epoch(examples, max_tokens=max_tokens, seed=0, epoch=epoch)
    assert sorted(i for group in groups for i in group) == list(range(len(examples)))
    for group in groups:
        longest = max(lengths[i] for i in group)
        assert len(group) == 1 or longest * len(group) <= max_tokens
    assert groups == groups_of_epoch(examples, max_tokens=max_tokens, seed=0, epoch=epoch)


def test_all_forms_of_examples(tmp_path: Path, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    lines = [
        {"prompt_token_ids": [1, 2], "token_ids": [3, 4], "domain": "own"},
        {"messages": chat},
        {"prompt": "ab", "completion": "cd"},
        {"text": "abc"},
        {"text": "x" * 200},
        {"prompt_token_ids": list(range(64)), "token_ids": [3]},  # the prompt fills it: left out
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    found = read_examples([path], tokenizer, max_length=64)
    assert found[0] == Example((1, 2, 3, 4), 2, "own")
    assert tokenizer.decode(found[1].token_ids[found[1].num_prompt :]) == "cd\n"
    eos = tokenizer.eos_token_id
    assert found[2].token_ids == (*tokenizer.encode("abcd"), eos)
    assert found[2].num_prompt == 2
    assert found[3] == Example(tuple(tokenizer.encode("abc")), 1, "data")
    assert len(found[4].token_ids) == 64
    assert len(found) == 5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "in.jsonl:1: no valid JSON"),
        ("[]", "in.jsonl:1: must be an object, got list"),
        ('{"prompt": "a"}', "in.jsonl:1: no example; .*--self-distill"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "the last message must be the assis"),
        ("", "nothing to train on"),
    ],
)
def test_what_is_no_example_is_named(
    tmp_path: Path, tiny_model: Path, line: str, message: str
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(line)
    with pytest.raises(TrainingError, match=message):
        read_examples([path], load_tokenizer(tiny_model), max_length=64)
