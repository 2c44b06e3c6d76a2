"""``fathom train exits``: from examples to an adapter."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fathom.config import DEFAULT_MODEL
from fathom.models.adapters import Adapter
from fathom.models.files import weights_digest
from fathom.models.resolve import resolve_model
from fathom.models.tokenizer import Tokenizer, load_tokenizer
from fathom.training.card import card
from fathom.training.errors import TrainingError
from fathom.training.examples import Batch, Example, digest_of
from fathom.training.export import export
from fathom.training.model import ShallowDeep, Shape, fit_head
from fathom.training.objective import Objective, TrainSettings
from fathom.training.trainer import Trainer
from fathom.training.validate import Drafts, deep_choices, draft, figures

HELDOUT_EVERY = 20
_FIT_ROWS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitTraining:
    """Everything that a run depends on.

    Attributes:
        name: the adapter's. model: as in ``EngineConfig``.
        subset: tokens that the exit head scores, the most frequent targets; 0: all.
        fit: start the head's map at a ridge regression.
        recompute: trade a second forward pass for memory.
    """

    name: str
    model: str = DEFAULT_MODEL
    shape: Shape
    settings: TrainSettings
    subset: int = 4096
    fit: bool = True
    recompute: bool = False
    device: str = "cpu"

    def validate(self) -> None:
        """Check every number that needs no model.

        Raises:
            TrainingError: naming the first one out of range, and its value.
        """
        self.settings.validate()
        if self.subset < 0:
            raise TrainingError(f"subset must be at least 0 (0: all tokens), got {self.subset}.")


@dataclass(slots=True)
class Outcome:
    """What a run gave.

    Attributes:
        drafts: on held-out examples, at the best step. curve: (step, agreement) of each check.
        base: the trained model itself, where all of it was trained.
    """

    adapter: Adapter
    drafts: Drafts
    curve: list[tuple[int, float]]
    base: Any = None
    tokenizer: Tokenizer | None = None

    def write(self, folder: Path) -> None:
        """Write the adapter with its card; a fully trained model goes to ``folder/model``."""
        if self.base is not None and self.tokenizer is not None:
            self.base.to(torch.bfloat16).save_pretrained(folder / "model")
            self.tokenizer.hf.save_pretrained(folder / "model")
            digest = weights_digest(folder / "model")
            metadata = {**self.adapter.metadata, "model": str(folder / "model")}
            metadata["weights_digest"] = digest
            self.adapter = replace(self.adapter, metadata=metadata)
        self.adapter.write(folder)
        command = "fathom " + " ".join(sys.argv[1:])
        (folder / "README.md").write_text(card(self.adapter, self.drafts, self.curve, command))


def load_base(model: str, *, trained: bool, device: str) -> tuple[Any, Tokenizer, Path]:
    """A Hugging Face model for training, its tokenizer and its directory.

    Args:
        trained: its own weights will be trained, in float32; otherwise bfloat16 is enough.

    Raises:
        ModelError: if it is not to be had. TrainingError: if transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    from fathom.training import attention  # registers itself

    disable_progress_bar()
    directory = resolve_model(model)
    try:
        base = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32 if trained else torch.bfloat16,
            attn_implementation=attention.NAME,
            local_files_only=True,
        )
    except (OSError, ValueError) as error:
        raise TrainingError(f"{model}: cannot load it: {error}") from error
    return base.to(device), load_tokenizer(directory), directory


def rank_tokens(examples: Sequence[Example], vocab_size: int) -> Tensor:
    """Every token id, most frequent target first, [vocab_size] int64.

    Ties, the many tokens never seen among them, go by id: a byte-pair vocabulary is numbered in
    order of merging, that is roughly by frequency.
    """
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for example in examples:
        targets = torch.tensor(example.token_ids[example.num_prompt :])
        counts += torch.bincount(targets, minlength=vocab_size)
    return counts.argsort(descending=True, stable=True)


def split_heldout(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples: every twentieth is held out; of fewer, the last.

    Raises:
        TrainingError: for a single example.
    """
    every = min(HELDOUT_EVERY, len(examples))
    if every < 2:
        raise TrainingError("a single example cannot be parted: give more, or --heldout FILE.")
    train = [e for i, e in enumerate(examples) if i % every != every - 1]
    return train, list(examples[every - 1 :: every])


def train_exits(
    run: ExitTraining,
    train: Sequence[Example],
    heldout: Sequence[Example],
    work_dir: Path,
    *,
    log: Callable[[int, dict[str, float]], None] = lambda step, figures: None,
    on_save: Callable[[], None] = lambda: None,
    show: bool = True,
) -> Outcome:
    """Train an adapter; a run that was interrupted goes on from ``work_dir``.

    Args:
        log, on_save: see ``Trainer.run``.

    With frozen shared layers the state of the best agreement on held-out examples is kept,
    otherwise the last one.

    Raises:
        ModelError, TrainingError: naming what cannot be used.
    """
    run.validate()
    work_dir.mkdir(parents=True, exist_ok=True)
    tunes = run.shape.tune != "exit"
    torch.manual_seed(run.settings.seed)
    base, tokenizer, directory = load_base(
        run.model, trained=run.shape.tune == "full", device=run.device
    )
    model = ShallowDeep(base, run.shape).to(run.device)
    model.recompute = run.recompute
    vocab_size = model.lm_head.weight.shape[0]
    token_ids = rank_tokens(train, vocab_size)[: run.subset or vocab_size].to(run.device)
    weight = model.lm_head.weight.detach()[token_ids].clone()
    batches = [batch.to(run.device) for batch in batches_of(heldout)]
    original = _original(run, directory) if run.settings.hold else None
    objective = Objective(
        model,
        run.settings,
        weight=weight,
        token_ids=token_ids,
        vocab_size=vocab_size,
        original=original,
    )
    depends_on = {
        "heldout": digest_of(heldout),
        "weights": weights_digest(directory),
        "subset": run.subset,
    }
    trainer = Trainer(objective, train, work_dir=work_dir, device=run.device, depends_on=depends_on)
    if run.fit and run.shape.head_adapter and not trainer.has_checkpoint:
        with objective.autocast():
            fit_head(model, _rows_to_fit(train, run.device))
    # A frozen full path chooses the same at every check.
    choices = None if tunes else _choices(objective, batches)

    def drafts_now() -> Drafts:
        own = _choices(objective, batches) if choices is None else choices
        with objective.autocast():
            return draft(model, batches, own, weight, token_ids)

    best = work_dir / "best.pt"
    trainer.run(
        check=lambda: figures(drafts_now()),
        # Agreement with a full path that is trained too says nothing of that path's quality:
        # there the last state counts.
        on_best=(lambda: None) if tunes else (lambda: _keep(model, best)),
        log=log,
        on_save=on_save,
        show=show,
    )
    if best.exists():
        kept = torch.load(best, weights_only=True, map_location=run.device)
        with torch.no_grad():
            for name, parameter in model.trained().items():
                parameter.copy_(kept[name])
    model.eval()
    drafts = drafts_now()
    found = figures(drafts)
    notes = {
        "settings": asdict(run.settings),
        "shape": asdict(run.shape),
        "examples": len(train),
        "targets": sum(e.num_targets for e in train),
        "best_step": trainer.progress.step if tunes else trainer.progress.best_step,
        "heldout": {name: round(value, 4) for name, value in found.items()},
    }
    metadata = {
        "name": run.name,
        "model": run.model,
        "weights_digest": weights_digest(directory),
        "training": json.dumps(notes),
    }
    outcome = Outcome(export(model, token_ids, metadata), drafts, trainer.progress.checks)
    if run.shape.tune == "full":
        outcome.base, outcome.tokenizer = model.base, tokenizer
    return outcome


def batches_of(examples: Sequence[Example], size: int = 8) -> list[Batch]:
    """Examples in batches of ``size``, in order."""
    return [Batch.of(examples[i : i + size]) for i in range(0, len(examples), size)]


def _original(run: ExitTraining, directory: Path) -> Callable[[Batch, Tensor], Tensor]:
    """The untouched model's final-normed states at a batch's rows."""
    base, _, _ = load_base(str(directory), trained=False, device=run.device)
    base.requires_grad_(False)

    def states(batch: Batch, rows: Tensor) -> Tensor:
        normed: Tensor = base.model(batch.token_ids).last_hidden_state[rows]
        return normed

    return states


def _choices(objective: Objective, batches: Sequence[Batch]) -> list[Tensor]:
    with objective.autocast():
        return deep_choices(objective.model, batches)


def _rows_to_fit(train: Sequence[Example], device: str) -> list[Batch]:
    """Some examples, spread evenly over all of them."""
    mean = max(1, sum(e.num_targets for e in train) // max(1, len(train)))
    step = max(1, len(train) * mean // _FIT_ROWS)
    return [batch.to(device) for batch in batches_of(train[::step])]


def _keep(model: ShallowDeep, file: Path) -> None:
    partial = file.with_suffix(".partial")
    torch.save({name: p.detach() for name, p in model.trained().items()}, partial)
    partial.replace(file)
