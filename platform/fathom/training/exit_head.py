"""Train an exit head on a frozen model: the quick first head that `fathom` drafts with.

An exit head reads the hidden state h after layer k and predicts the token that the whole model
would choose::

    logits = W_lm[token_ids] @ norm(h + A h)

W_lm is the model's own LM head (shared, frozen; perhaps only the rows of the most frequent
tokens), norm an RMSNorm with its own weight and A a linear map. Only A and the norm are trained,
so a head is a file of about a megabyte, and the full model stays what it was: its greedy output,
which mode ``exact`` reproduces, cannot change.

Steps; collected rows stay in ``--work-dir``, so a second run goes on from them:

1. ``collect``: the model answers training prompts greedily and reads plain text; for every row the
   hidden states after each candidate layer, the final-normed state and the deep argmax are kept.
2. ``train``: one head a candidate layer.
3. ``evaluate``, ``report``: agreement, coverage, precision and predicted speed-up, held out.
4. save: one head as safetensors.

Run ``python -m fathom.training.exit_head --help``. The data sets are read from the folder that
the environment variable ``FATHOM_DATA`` names.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from fathom.config import DEFAULT_MODEL
from fathom.models.errors import ModelError
from fathom.models.files import weights_digest
from fathom.models.heads import FORMAT_VERSION
from fathom.models.resolve import resolve_model
from fathom.training.collect import CollectSettings, collect
from fathom.training.data import DATA_HELP, rank_tokens
from fathom.training.errors import TrainingError
from fathom.training.evaluate import Costs, Evaluation, evaluate
from fathom.training.report import report
from fathom.training.rows import join, load_rows, split_validation
from fathom.training.train import TrainableHead, TrainSettings, fit_linear, save_head, train_head

log = logging.getLogger(__name__)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fathom.training.exit_head",
        description="Train an exit head on a frozen model.",
        epilog=DATA_HELP,
    )
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, help="hub id or directory of the model")
    add("--model-name", default="", help="name to write into the file (default: --model)")
    add("--work-dir", type=Path, required=True, help="folder of collected rows; resumable")
    add("--layers", type=int, nargs="+", default=[8, 10, 12, 15, 18, 20], help="layers to collect")
    add("--train-layers", type=int, nargs="+", help="candidates k among them (default: all)")
    add("--answer-batches", type=int, default=3, help="batches of prompts a domain")
    add("--batch", type=int, default=64, help="prompts a batch")
    add("--max-new-tokens", type=int, default=128, help="longest answer collected")
    add("--text-batches", type=int, default=6, help="batches of 32 passages of plain text")
    add("--subset-sizes", type=int, nargs="+", default=[1024, 2048, 4096, 8192], help="to evaluate")
    add("--train-subset", type=int, default=2048, help="LM-head rows in the training loss")
    add("--steps", type=int, default=600, help="most training steps a head")
    add("--learning-rate", type=float, default=1e-3)
    add("--mse", type=float, default=0.0, help="weight of the error to the final-normed state")
    add("--outside", type=float, default=0.1, help="weight of rows whose answer is not in the set")
    add("--lm-head-cost", type=float, default=8.0, help="price of the full LM head, in layers")
    add("--out", type=Path, help="where to write the head; left out, nothing is written")
    add("--save-layer", type=int, help="k to write (default: best prediction of mode exact)")
    add("--save-subset", type=int, help="tokens of its LM head (default: likewise)")
    add("--report", type=Path, help="also write the tables (Markdown) to this file")
    add("--threads", type=int, default=1, help="torch threads")
    add("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def load_model(name: str) -> tuple[Any, Any]:
    """The model in bfloat16 and its tokenizer.

    Raises:
        ModelError: when it can be neither found nor fetched.
        TrainingError: when it cannot be read, or has no chat template.
    """
    directory = resolve_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        # Eager attention: decoding a padded batch on CPU is about twice as fast as with SDPA.
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, attn_implementation="eager"
        )
    except (OSError, ValueError) as error:
        raise TrainingError(f"--model {name}: cannot load it: {error}") from error
    if not tokenizer.chat_template:
        raise TrainingError(f"--model {name} has no chat template: prompts cannot be put to it.")
    return model.eval(), tokenizer


def run(args: argparse.Namespace) -> None:
    """Collect, train, report, save."""
    torch.set_num_threads(args.threads)
    candidates = args.train_layers or args.layers
    if not set(candidates) <= set(args.layers):
        raise TrainingError(f"--train-layers {candidates} must be among --layers {args.layers}.")
    started = time.monotonic()
    model, tokenizer = load_model(args.model)
    name = args.model_name or args.model
    settings = CollectSettings(
        model=name,
        layers=tuple(args.layers),
        answer_batches=args.answer_batches,
        batch=args.batch,
        max_new_tokens=args.max_new_tokens,
        text_batches=args.text_batches,
        text_batch=32,
        text_length=256,
        seed=args.seed,
    )
    collect(settings, args.work_dir, model, tokenizer)
    collected = time.monotonic() - started
    lm_weight = model.lm_head.weight.detach()
    norm_weight, eps = model.model.norm.weight.detach(), model.config.rms_norm_eps
    costs = Costs(model.config.num_hidden_layers, lm_weight.shape[0], args.lm_head_cost)
    training = TrainSettings(
        subset=args.train_subset,
        steps=args.steps,
        learning_rate=args.learning_rate,
        mse=args.mse,
        outside=args.outside,
        seed=args.seed,
    )
    del model

    evaluations: list[Evaluation] = []
    heads: dict[int, tuple[TrainableHead, dict[str, Any]]] = {}
    ranked: Tensor | None = None
    for k in candidates:
        rows = load_rows(args.work_dir, "train", k)
        if ranked is None:
            said = torch.cat([r.argmax for d, r in rows.items() if d != "classics"])
            ranked = rank_tokens(tokenizer, said, lm_weight.shape[0])
        train, valid = split_validation(join(list(rows.values())))
        untrained, head = TrainableHead(norm_weight, eps), TrainableHead(norm_weight, eps)
        fit_linear(head, train)
        summary = train_head(head, train, valid, lm_weight, ranked, training)
        log.info("k=%d: %s", k, summary)
        heads[k] = head, summary
        variants = {"untrained": untrained, "trained": head}
        heldout = load_rows(args.work_dir, "heldout", k)
        evaluations += evaluate(variants, k, heldout, lm_weight, ranked, args.subset_sizes, costs)
    text = report(evaluations)
    print(text)
    if args.report:
        args.report.write_text(text)
    log.info("collected in %.0f s, all done in %.0f s", collected, time.monotonic() - started)
    if args.out and ranked is not None:
        write_best(args, evaluations, heads, ranked, training, name)


def exact_speedup(evaluation: Evaluation) -> float:
    """The predicted speed-up of mode ``exact`` over all chats; 0 without one."""
    prediction = evaluation.best["chats"]["exact"]
    return prediction.speedup if prediction else 0.0


def write_best(
    args: argparse.Namespace,
    evaluations: Sequence[Evaluation],
    heads: dict[int, tuple[TrainableHead, dict[str, Any]]],
    ranked: Tensor,
    training: TrainSettings,
    name: str,
) -> None:
    """Write the head that was asked for, or else the fastest in mode ``exact``.

    Args:
        heads: k -> the trained head and the summary of its training.
        ranked: [vocab] int64, most frequent token first. name: the model's, for the file.

    Raises:
        TrainingError: when the layer or the subset asked for was not among the candidates.
    """
    choices = [
        e
        for e in evaluations
        if e.variant == "trained"
        and args.save_layer in (None, e.k)
        and args.save_subset in (None, e.subset)
    ]
    if not choices:
        raise TrainingError(
            f"no candidate has layer {args.save_layer} and {args.save_subset} tokens: "
            f"layers {list(heads)}, sizes {args.subset_sizes} or {len(ranked)}."
        )
    best = max(choices, key=exact_speedup)
    head, summary = heads[best.k]
    held = {d: round(x.agree.float().mean().item(), 4) for d, x in best.drafts.items()}
    metadata = {
        "format_version": FORMAT_VERSION,
        "model": name,
        "exit_layer": str(best.k),
        "weights_digest": weights_digest(resolve_model(args.model)),
        "norm_eps": repr(head.eps),
        "training": json.dumps({**asdict(training), **summary, "heldout_agreement": held}),
    }
    save_head(args.out, head, ranked[: best.subset], metadata)
    log.info("wrote %s: layer %d, %d tokens", args.out, best.k, best.subset)


def main() -> None:
    """Entry point; errors that the user can put right end in one line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        run(parse())
    except (TrainingError, ModelError) as error:
        raise SystemExit(f"exit_head: {error}") from error


if __name__ == "__main__":
    main()
