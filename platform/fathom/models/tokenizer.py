"""Text to token ids and back, also one token at a time."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream

from fathom.models.cache import content_key, remembered
from fathom.models.errors import ModelError

Backend = tokenizers.Tokenizer
"""The Rust tokenizer: ids and text, no chat templates."""

_TEXT_FILES = {".json", ".jinja", ".model", ".tiktoken", ".txt"}
"""Suffixes of the files that a tokenizer may be read from."""


class ChatTemplateError(ValueError):
    """Messages that cannot be turned into a prompt: no chat template, or one that rejects them."""


class Tokenizer:
    """A model's tokenizer.

    Args:
        hf: a transformers tokenizer with a Rust backend.

    Attributes:
        vocab_size: number of token ids, added tokens included. The model's may be larger.
        eos_token_id, bos_token_id: or None.
    """

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self.backend: Backend = hf.backend_tokenizer
        self.vocab_size: int = len(hf)
        self.eos_token_id: int | None = hf.eos_token_id
        self.bos_token_id: int | None = hf.bos_token_id
        self._byte_level = "ByteLevel" in repr(self.backend.decoder)
        self._added = {token.content for token in hf.added_tokens_decoder.values()}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = self.hf.encode(text, add_special_tokens=add_special_tokens, verbose=False)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], **kwargs: Any
    ) -> list[int]:
        """Token ids of a conversation, in the form that the model was trained on.

        Args:
            messages: with ``role`` and ``content``.
            kwargs: of transformers' ``apply_chat_template`` (``tools``, template variables);
                ``add_generation_prompt`` is True unless given.

        Raises:
            ChatTemplateError: if the model has no chat template or its template fails.
        """
        if not self.hf.chat_template:
            raise ChatTemplateError(
                "This model has no chat template: it takes plain prompts (/v1/completions) only."
            )
        options = {"add_generation_prompt": True, **kwargs}
        try:
            ids: list[int] = self.hf.apply_chat_template(
                list(messages), tokenize=True, return_dict=False, **options
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise ChatTemplateError(
                f"The model's chat template rejects these messages: {error}"
            ) from error
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, perhaps a part of a character; b"" for unused ids."""
        token = self.hf.convert_ids_to_tokens(token_id) if token_id < self.vocab_size else None
        if token is None:
            return b""
        if token in self._added:
            return str(token).encode()
        if self._byte_level:
            table = _byte_level_alphabet()
            if all(char in table for char in token):
                return bytes(table[char] for char in token)
            return str(token).encode()
        # SentencePiece's spellings: <0x0A> for a byte, a lower one eighth block for a space.
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return str(token).replace("\u2581", " ").encode()

    def token_text(self, token_id: int) -> str:
        """A token's text by itself, special tokens spelled out; U+FFFD for partial characters."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")


class IncrementalDetokenizer:
    """Turns a growing sequence of token ids into text, never showing half a character.

    For valid UTF-8 the pieces joined are the text that decoding the whole sequence gives.

    Args:
        backend: a ``Tokenizer``'s.
    """

    def __init__(self, backend: Backend, skip_special_tokens: bool = True) -> None:
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """Take one token; returns the text that it completes, often one token's, perhaps ""."""
        try:
            text: str | None = self._stream.step(self._backend, token_id)
        except Exception:
            # Byte-fallback tokenizers decode a run of bytes as a whole, so an invalid byte after
            # valid ones changes text that has been shown. The stream refuses; we start a new one.
            shown = self.flush()
            return shown + (self._stream.step(self._backend, token_id) or "")
        if text is None:
            self._held.append(token_id)
            return ""
        self._held.clear()
        return text

    def flush(self) -> str:
        """End of the sequence: the text of what is held back, incomplete bytes as U+FFFD."""
        text: str = self._backend.decode(self._held, skip_special_tokens=self._skip_special_tokens)
        self._held = []
        self._stream = DecodeStream(skip_special_tokens=self._skip_special_tokens)
        return text


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer of a Hugging Face directory.

    Which class is the right one takes transformers' ``AutoTokenizer``, which imports torch and
    more for seconds: what it took for files like these is remembered in the cache.

    Raises:
        ModelError: if it is missing, damaged, or has no Rust backend.
    """
    loaded: list[Any] = []

    def choose() -> str:
        from transformers import AutoTokenizer

        loaded.append(AutoTokenizer.from_pretrained(str(path), local_files_only=True))
        return f"{type(loaded[0]).__module__}:{type(loaded[0]).__qualname__}"

    try:
        module, _, name = remembered("tokenizer-classes", _key(path), choose).partition(":")
        hf = loaded[0] if loaded else _load(module, name, path)
    except Exception as error:  # many kinds, for files that are missing or malformed
        raise ModelError(f"{path}: cannot load the tokenizer: {error}") from error
    if not hasattr(hf, "backend_tokenizer"):
        raise ModelError(f"{path}: the tokenizer has no Rust backend; a tokenizer.json is needed.")
    return Tokenizer(hf)


def load_backend(path: Path) -> Backend:
    """What turns ids into text, of the tokenizer in a Hugging Face directory.

    It is ``load_tokenizer(path).backend``, remembered in the cache: who needs no more than this
    starts without transformers, which takes seconds to import.

    Raises:
        ModelError: as ``load_tokenizer`` does.
    """
    try:
        key = _key(path)
    except OSError as error:
        raise ModelError(f"{error.filename}: cannot read: {error.strerror}.") from error
    text = remembered("tokenizers", key, lambda: load_tokenizer(path).backend.to_str())
    return Backend.from_str(text)


def _key(path: Path) -> str:
    """What a tokenizer depends on."""
    files = [file for file in sorted(path.iterdir()) if file.suffix in _TEXT_FILES]
    return content_key(files, importlib.metadata.version("transformers"))


def _load(module: str, name: str, path: Path) -> Any:
    kind = getattr(importlib.import_module(module), name)
    return kind.from_pretrained(str(path), local_files_only=True)


@lru_cache(maxsize=1)
def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones stand for themselves, others moved past 255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}
