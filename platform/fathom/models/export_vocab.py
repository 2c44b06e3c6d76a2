"""A draft model over fewer tokens than its target: rows cut out, and a tokenizer that names them.

The whole LM head of a small model costs a draft as much as its layers. Engines that take drafts
with a vocabulary of their own (vLLM's ``use_heterogeneous_vocab``) match tokens by their spelling,
draft among those that both have, and give the draft ``UNKNOWN`` for every other one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models
from torch import Tensor

from fathom.models.config import ModelError
from fathom.models.export import EMBEDDING, HEAD, Draft
from fathom.models.tokenizer import ChatTemplateError, Tokenizer

UNKNOWN = "<|fathom-unknown|>"


def choose_tokens(ranked: Tensor, tokenizer: Tokenizer, count: int) -> list[int]:
    """Token ids of a draft's vocabulary.

    The tokenizer's special tokens and those of its chat template, which every chat has; then those
    that an exit head ranks, most frequent first; then the lowest ids, since byte-pair merges are
    learned most frequent first.

    Args:
        ranked: int64 [n], perhaps empty.
        count: how many; fewer if the tokenizer has fewer.
    """
    special = sorted(tokenizer.hf.all_special_ids)
    every = [*special, *_of_chats(tokenizer), *ranked.tolist(), *range(tokenizer.vocab_size)]
    spelled = (i for i in dict.fromkeys(every) if tokenizer.hf.convert_ids_to_tokens(i) is not None)
    return [token for token, _ in zip(spelled, range(count), strict=False)]


def _of_chats(tokenizer: Tokenizer) -> list[int]:
    """Tokens that the chat template itself writes; none without one."""
    turns = [{"role": role, "content": ""} for role in ("user", "assistant", "user")]
    for messages in (turns, turns[:1]):
        # A template is a program, and may refuse these.
        with contextlib.suppress(ChatTemplateError):
            return tokenizer.apply_chat_template(messages)
    return []


def narrowed(draft: Draft, token_ids: Sequence[int]) -> Draft:
    """A draft over those tokens, in that order, and ``UNKNOWN`` as the last.

    What stands for an unknown token in a text is the mean embedding of those left out.

    Raises:
        ModelError: if no token is left out.
    """
    table = draft.tensors[EMBEDDING]
    kept = torch.tensor(token_ids)
    left_out = torch.ones(len(table), dtype=torch.bool)
    left_out[kept] = False
    if not left_out.any():
        raise ModelError(
            f"a draft's vocabulary must be smaller than the model's {len(table)} tokens, got "
            f"{len(token_ids)}; 0 takes the whole one."
        )
    tensors = dict(draft.tensors)
    tensors[EMBEDDING] = torch.cat((table[kept], table[left_out].mean(0, keepdim=True)))
    if HEAD in tensors:
        # The engine never drafts UNKNOWN, which the target does not have: any row will do.
        head = tensors[HEAD]
        tensors[HEAD] = torch.cat((head[kept], head.new_zeros(1, head.shape[1])))
    place = {token: index for index, token in enumerate(token_ids)}
    config = {**draft.config, "vocab_size": len(kept) + 1}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(name)
        if isinstance(value, list):
            config[name] = [place[i] for i in value if i in place] or None
        elif value is not None:
            config[name] = place.get(value)
    return dataclasses.replace(draft, config=config, tensors=tensors)


def write_tokenizer(tokenizer: Tokenizer, token_ids: Sequence[int], out: Path) -> None:
    """Write a tokenizer whose vocabulary spells the kept tokens as the model's does.

    It serves to match vocabularies, not to encode text.
    """
    from transformers import PreTrainedTokenizerFast  # takes seconds to import

    names: list[str] = tokenizer.hf.convert_ids_to_tokens(list(token_ids))
    vocabulary = {name: index for index, name in enumerate(names)} | {UNKNOWN: len(names)}
    rust = RustTokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    hf = PreTrainedTokenizerFast(tokenizer_object=rust, unk_token=UNKNOWN)
    hf.save_pretrained(out)
