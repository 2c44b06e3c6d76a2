"""A tiny model with prompts and a trace of them, as `fathom generate --trace` records it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from fathom.cli import main
from tests.tiny_models import save_random_llama

WORDS = (
    "rain", "falls", "on", "the", "old", "roof", "while", "seven", "quiet", "birds", "wait", "for",
    "light",
)  # fmt: skip


def record(
    folder: Path, tokenizer: Path, *, prompts: int = 16, new_tokens: int = 24, **shape: int
) -> Path:
    """Write ``p.jsonl`` and ``t.parquet`` of a random model whose exit is right now and then.

    Args:
        tokenizer: of a model over bytes (``tests.tiny_models.tiny_model``).
        shape: fields of ``LlamaConfig`` that differ from ``tests.tiny_models.TINY``.

    Returns:
        the model.
    """
    model = save_random_llama(
        folder / "model", seed=3, vocab_size=257, max_position_embeddings=160,
        initializer_range=0.08, tie_word_embeddings=True, eos_token_id=256, bos_token_id=None,
        **shape,
    )  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, model)
    lines = [{"prompt": " ".join(WORDS[i % 7 : i % 7 + 3 + i % 5])} for i in range(prompts)]
    (folder / "p.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    done = main(
        ["generate", "--prompts", str(folder / "p.jsonl"), "--json", str(folder / "a.jsonl"),
         "--mode", "free", "--exit-threshold", "1", "--trace", str(folder / "t.parquet"),
         "--model", str(model), "--adapter", "none", "--exit-layer", "2", "--dtype", "float32",
         "--threads", "1", "--new-tokens", str(new_tokens), "--kv-cache-bytes", str(8 << 20)]
    )  # fmt: skip
    assert done == 0
    return model
