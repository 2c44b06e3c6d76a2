"""The peer: transformers' ``generate`` on the same weights, prompts, type and threads."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria
from transformers.utils.logging import disable_progress_bar

from fathom.bench.measure import Prompts, Run, groups


class TransformersContender:
    """Greedy ``generate`` with its own KV cache, prompts of a group padded on the left.

    Args:
        directory: the model in Hugging Face form. dtype: as ``EngineConfig.dtype``.
        pad_token_id: any token; the attention mask hides it. device: a torch device string.
    """

    engine = "transformers"
    mode = "full"

    def __init__(self, directory: Path, dtype: str, pad_token_id: int, device: str = "cpu") -> None:
        disable_progress_bar()
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(directory), dtype=getattr(torch, dtype), local_files_only=True
        )
        self._model = model.eval().to(device)
        self._pad = pad_token_id

    def run(self, prompts: Prompts, batch: int, new_tokens: int) -> Run:
        """See ``Contender.run``."""
        run = Run()
        # A fresh configuration: sampling defaults of the model's own file do not apply.
        config = GenerationConfig(
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=self._pad,
            use_cache=True,
        )
        begin = time.perf_counter()
        for group in groups(prompts, batch):
            ids, mask = self._padded(group)
            clock = _Clock()
            start = time.perf_counter()
            with torch.inference_mode():
                out = self._model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=config,
                    stopping_criteria=[clock],
                )
            run.token_ids += out[:, ids.shape[1] :].tolist()
            for _ in group:
                run.time_tokens(start, clock.times)
        run.seconds = time.perf_counter() - begin
        return run

    def _padded(self, group: Prompts) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask, [batch, longest prompt] int64 each."""
        width = max(map(len, group))
        ids = torch.full((len(group), width), self._pad)
        mask = torch.zeros((len(group), width), dtype=torch.int64)
        for row, prompt in enumerate(group):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        return ids.to(self._model.device), mask.to(self._model.device)


class _Clock(StoppingCriteria):
    """Stops nothing: ``generate`` calls it after each token, which tells the token's time."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
