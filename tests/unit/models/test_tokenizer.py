"""Tokenizers of both spellings of bytes, whole and one token at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fathom.models.errors import ModelError
from fathom.models.tokenizer import (
    ChatTemplateError,
    IncrementalDetokenizer,
    Tokenizer,
    load_backend,
    load_tokenizer,
)

SPECIAL = ["<unk>", "<s>", "</s>"]
TEXT = st.text(alphabet=st.sampled_from("ab z\nñ世界é🎉👩‍👧🇩🇪Ω\u0301"), max_size=30)


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet, "ab", "Ġa", "ðŁ", "ðŁİ"])}
    backend = Backend(models.BPE(vocab, [("a", "b"), ("Ġ", "a"), ("ð", "Ł"), ("ðŁ", "İ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return wrap(backend)


def byte_fallback() -> Tokenizer:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁", "a", "b", "ab", "▁a", "z", "é", "世"]
    vocab = {token: i for i, token in enumerate([*SPECIAL, *byte_tokens, *words])}
    merges = [("a", "b"), ("▁", "a")]
    backend = Backend(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return wrap(backend)


def wrap(backend: Backend) -> Tokenizer:
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return Tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    )


TOKENIZERS = {"byte_level": byte_level(), "byte_fallback": byte_fallback()}
both = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())


@both
@given(text=TEXT)
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_text_and_never_hold_half_a_character(
    tokenizer: Tokenizer, text: str
) -> None:
    ids = tokenizer.encode(text)
    stream = IncrementalDetokenizer(tokenizer.backend)
    pieces = [stream.push(token_id) for token_id in ids]
    assert "\ufffd" not in "".join(pieces)
    assert stream.flush() == ""
    assert "".join(pieces) == text == tokenizer.decode(ids)


@both
@given(text=TEXT, cut=st.integers(0, 60))
@settings(max_examples=100, deadline=None)
def test_a_cut_text_ends_in_what_decoding_it_whole_gives(
    tokenizer: Tokenizer, text: str, cut: int
) -> None:
    ids = tokenizer.encode(text)[:cut]
    stream = IncrementalDetokenizer(tokenizer.backend)
    shown = "".join(stream.push(token_id) for token_id in ids)
    assert text.startswith(shown)
    if tokenizer is TOKENIZERS["byte_level"]:
        assert shown + stream.flush() == tokenizer.decode(ids)
    else:  # a byte-fallback decoder would also undo whole characters before the half one
        assert set(stream.flush()) <= {"\ufffd"}


@given(ids=st.lists(st.integers(0, 262), max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_token_ids_stream_to_their_decoding(ids: list[int]) -> None:
    tokenizer = TOKENIZERS["byte_level"]
    stream = IncrementalDetokenizer(tokenizer.backend)
    text = "".join(stream.push(token_id) for token_id in ids) + stream.flush()
    assert text == tokenizer.decode(ids)


@given(ids=st.lists(st.integers(0, 266), max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_token_ids_stream_without_an_error(ids: list[int]) -> None:
    stream = IncrementalDetokenizer(TOKENIZERS["byte_fallback"].backend)
    for token_id in ids:
        assert isinstance(stream.push(token_id), str)
    stream.flush()
    assert stream.flush() == ""


@both
def test_special_tokens_are_hidden_or_shown(tokenizer: Tokenizer) -> None:
    for skip, expected in ((True, "ab"), (False, "<s>ab</s>")):
        stream = IncrementalDetokenizer(tokenizer.backend, skip_special_tokens=skip)
        ids = [*tokenizer.encode("ab"), tokenizer.eos_token_id]
        assert "".join(map(stream.push, ids)) == expected
        assert tokenizer.decode(ids, skip_special_tokens=skip) == expected
    assert tokenizer.encode("ab", add_special_tokens=False) == tokenizer.encode("ab")[1:]


@both
@given(text=TEXT)
@settings(max_examples=100, deadline=None)
def test_token_bytes_join_to_the_texts_bytes(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@both
def test_token_text_spells_special_tokens_and_keeps_spaces(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_text(2) == "</s>"
    (space_a,) = tokenizer.encode(" a", add_special_tokens=False)
    assert tokenizer.token_text(space_a) == " a"
    first_byte = tokenizer.encode("🎉", add_special_tokens=False)[0]
    assert tokenizer.token_text(first_byte) == "\ufffd"
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""  # a padded embedding's id


def test_chat_template_errors_say_what_is_wrong() -> None:
    tokenizer = byte_level()
    messages = [{"role": "user", "content": "ab"}]
    with pytest.raises(ChatTemplateError, match="no chat template"):
        tokenizer.apply_chat_template(messages)
    tokenizer.hf.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}"
        "{% endif %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}z{% endif %}"
    )
    assert tokenizer.decode(tokenizer.apply_chat_template(messages)) == "abz"
    plain = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    assert tokenizer.decode(plain) == "ab"
    with pytest.raises(ChatTemplateError, match="rejects these messages: no tools here"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


def test_missing_and_damaged_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=f"{tmp_path}: cannot load the tokenizer"):
        load_tokenizer(tmp_path)


def test_default_models_tokenizer(default_model: Path) -> None:
    tokenizer = load_tokenizer(default_model)
    assert (tokenizer.vocab_size, tokenizer.eos_token_id, tokenizer.bos_token_id) == (49152, 2, 1)
    text = "Grüße, 世界! 👩‍👩‍👧‍👦 🇩🇪"
    ids = tokenizer.encode(text)
    stream = IncrementalDetokenizer(tokenizer.backend)
    assert "".join(map(stream.push, ids)) + stream.flush() == text
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    shown = tokenizer.decode(chat, skip_special_tokens=False)
    assert shown.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@both
def test_the_remembered_backend_decodes_as_the_tokenizer_does(
    tokenizer: Tokenizer, tmp_path: Path, cache: Path
) -> None:
    tokenizer.hf.save_pretrained(tmp_path / "model")
    for _ in range(2):  # made, then remembered
        backend = load_backend(tmp_path / "model")
        ids = range(backend.get_vocab_size())
        for skip in (True, False):
            texts = [backend.decode([i, i], skip_special_tokens=skip) for i in ids]
            assert texts == [tokenizer.decode([i, i], skip_special_tokens=skip) for i in ids]
    (note,) = (cache / "tokenizers").iterdir()
    # Another special token in one of its files is another tokenizer.
    tokenizer.hf.add_special_tokens({"additional_special_tokens": ["ab"]})
    tokenizer.hf.save_pretrained(tmp_path / "model")
    assert "ab" not in load_backend(tmp_path / "model").decode([tokenizer.encode("ab")[-1]])
    assert [note] != list((cache / "tokenizers").iterdir())


def test_a_backend_that_cannot_be_loaded(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ModelError, match=str(folder)):
            load_backend(folder)
