"""Self-distilled rows: what a model says and reads, with its hidden states, in resumable shards.

The labels of a head are the whole model's own greedy choices. For every row the states after each
candidate layer, the final-normed state and the token chosen are kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from fathom.training.data import Prompt, heldout_prompts, passages, train_prompts
from fathom.training.errors import TrainingError


@dataclass(frozen=True, slots=True)
class CollectSettings:
    """What a collection depends on; a work folder belongs to one of these.

    Attributes:
        model: its name. layers: candidate exit layers k. seed: of the choice of prompts.
        answer_batches: shards of answers a domain. batch: prompts in each.
        max_new_tokens: longest answer. text_batches: shards of plain text. text_batch: passages in
            each. text_length: tokens at most of a passage.
    """

    model: str
    layers: tuple[int, ...]
    answer_batches: int
    batch: int
    max_new_tokens: int
    text_batches: int
    text_batch: int
    text_length: int
    seed: int


class Recorder:
    """Catches hidden states while the model runs, by forward hooks.

    After a forward pass ``hidden[k]`` is the state after layer k and ``hidden[0]`` the
    final-normed state, each [batch, positions, d].

    Raises:
        TrainingError: for a model that is no decoder of the Llama shape, or a layer out of range.
    """

    def __init__(self, model: Any, layers: Sequence[int]) -> None:
        inner = getattr(model, "model", None)
        blocks, norm = getattr(inner, "layers", None), getattr(inner, "norm", None)
        if blocks is None or norm is None:
            raise TrainingError(
                f"{type(model).__name__} has no model.layers and model.norm: exit heads are "
                "trained for decoders of the Llama shape."
            )
        if not all(0 < k < len(blocks) for k in layers):
            raise TrainingError(f"--layers must lie from 1 to {len(blocks) - 1}, got {layers}.")
        self.hidden: dict[int, Tensor] = {}
        self.handles = [blocks[k - 1].register_forward_hook(self._keep(k)) for k in layers]
        self.handles.append(norm.register_forward_hook(self._keep(0)))

    def _keep(self, k: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self.hidden[k] = output[0] if isinstance(output, tuple) else output

        return hook

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()


@torch.inference_mode()
def answer_rows(
    model: Any, tokenizer: Any, recorder: Recorder, prompts: Sequence[Prompt], max_new_tokens: int
) -> dict[str, Tensor]:
    """Answer prompts greedily as one batch; keep the states that chose each answer token.

    The states come from the generating pass itself, so the labels are what the model said.

    Returns:
        ``hidden.k`` and ``hidden.0`` [rows, d] bfloat16, ``argmax`` [rows] int32 token ids,
        ``sequence`` [rows] int32 index of the prompt in the batch; rows of a sequence in order.
    """
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.text}], add_generation_prompt=True, tokenize=False
        )
        for prompt in prompts
    ]
    inputs = tokenizer(chats, return_tensors="pt", padding=True, add_special_tokens=False)
    steps: list[dict[int, Tensor]] = []
    handle = model.register_forward_hook(
        lambda *_: steps.append({k: h[:, -1].clone() for k, h in recorder.hidden.items()})
    )
    try:
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    finally:
        handle.remove()
    answers = output[:, inputs["input_ids"].shape[1] :]
    stops = answers == tokenizer.eos_token_id
    # A row counts up to and including its first end-of-sequence token; padding follows.
    valid = (stops.cumsum(1) - stops.int()) == 0
    rows = {f"hidden.{k}": torch.stack([s[k] for s in steps], 1)[valid] for k in steps[0]}
    rows["argmax"] = answers[valid].int()
    rows["sequence"] = torch.arange(len(prompts))[:, None].expand_as(answers)[valid].int()
    return rows


@torch.inference_mode()
def text_rows(
    model: Any, tokenizer: Any, recorder: Recorder, texts: Sequence[str], length: int
) -> dict[str, Tensor]:
    """Read texts teacher-forced; one row a position. Returns as ``answer_rows`` does.

    Args:
        length: tokens read of each text, at most.
    """
    batch = tokenizer(
        list(texts),
        return_tensors="pt",
        add_special_tokens=False,
        truncation=True,
        max_length=length,
        padding=True,
    )
    model.model(**batch)
    valid = batch["attention_mask"].bool()
    # The first positions carry attention sinks and hardly any context: no decoder drafts there.
    valid &= valid.cumsum(1) > 8
    rows = {f"hidden.{k}": h[valid].clone() for k, h in recorder.hidden.items()}
    rows["argmax"] = model.lm_head(rows["hidden.0"]).argmax(-1).int()
    rows["sequence"] = torch.arange(len(texts))[:, None].expand_as(valid)[valid].int()
    return rows


@dataclass(frozen=True, slots=True)
class Job:
    """One shard to collect: prompts to answer, or texts to read."""

    name: str
    domain: str
    prompts: tuple[Prompt, ...] = ()
    texts: tuple[str, ...] = ()


def plan_jobs(settings: CollectSettings) -> list[Job]:
    """The shards of a collection, held-out ones first; the same settings give the same plan.

    Training shards alternate between domains, so a collection cut short is still balanced.
    """
    held = heldout_prompts()
    jobs: list[Job] = []
    size = settings.batch
    for domain in ("gsm8k", "spec_bench"):
        # Prompts of like length share a batch: less padding.
        own = sorted((p for p in held if p.domain == domain), key=lambda p: len(p.text))
        # Long prompts stand at the end; smaller batches bound their memory.
        for start in range(0, len(own), 25):
            part = tuple(own[start : start + 25])
            jobs.append(Job(f"heldout-{len(jobs):04d}", domain, prompts=part))
    texts = passages("classics/classics_val.jsonl.xz", 16, 6 * settings.text_length, 1)
    jobs.append(Job(f"heldout-{len(jobs):04d}", "classics", texts=tuple(texts)))

    domains = train_prompts(settings.seed)
    count = settings.text_batches * settings.text_batch
    books = passages("classics/classics_train.jsonl.xz", count, 6 * settings.text_length, 2)
    for index in range(max(settings.answer_batches, settings.text_batches)):
        if index < settings.answer_batches:
            for domain, prompts in domains.items():
                part = tuple(prompts[index * size : (index + 1) * size])
                if part:
                    jobs.append(Job(f"train-{index:04d}-{domain}", domain, prompts=part))
        if index < settings.text_batches:
            start = index * settings.text_batch
            part_texts = tuple(books[start : start + settings.text_batch])
            jobs.append(Job(f"train-{index:04d}-classics", "classics", texts=part_texts))
    return jobs


def collect(settings: CollectSettings, work_dir: Path, model: Any, tokenizer: Any) -> None:
    """Write every shard that is missing from ``work_dir``; a second call goes on where one ended.

    Raises:
        TrainingError: when the folder holds shards of other settings.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    stamp = work_dir / "collect.json"
    wanted = json.loads(json.dumps(asdict(settings)))
    if stamp.exists() and json.loads(stamp.read_text()) != wanted:
        raise TrainingError(
            f"{work_dir} holds rows of other settings ({stamp.read_text().strip()}): name another "
            "--work-dir, or delete it."
        )
    stamp.write_text(json.dumps(wanted))
    recorder = Recorder(model, settings.layers)
    tokenizer.padding_side = "left"
    try:
        for job in tqdm(plan_jobs(settings), desc="collect", unit="shard"):
            path = work_dir / f"{job.name}.safetensors"
            if path.exists():
                continue
            if job.prompts:
                rows = answer_rows(model, tokenizer, recorder, job.prompts, settings.max_new_tokens)
            else:
                rows = text_rows(model, tokenizer, recorder, job.texts, settings.text_length)
            # Written aside and renamed, so that an interrupted run leaves no half shard.
            partial = path.with_suffix(".partial")
            save_file({k: v.contiguous() for k, v in rows.items()}, partial, {"domain": job.domain})
            partial.rename(path)
    finally:
        recorder.close()
