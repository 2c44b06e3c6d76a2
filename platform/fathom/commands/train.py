"""``fathom train``: exits that are worth taking."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from fathom.commands import probe, train_multi_exit
from fathom.commands.options import HelpFormatter, UsageError, add_command
from fathom.config import DEFAULT_MODEL

_ABOUT = """\
Train early exits of a model, and write them as an adapter that `fathom serve --adapter DIR` loads.

--tune exit keeps the model's own layers as they are, so that the full path cannot change, and
trains exit layers of the shallow path alone (--exit-layers) and the exit head. --tune lora and
--tune full train FREE's shallow-deep loss on the shared layers too.

Examples are JSON lines: {"messages": [...]} that end with the assistant's, {"prompt": ...,
"completion": ...}, {"text": ...}, or token ids as `fathom generate --json` writes them. With
--self-distill they are prompts as `fathom generate --prompts` takes them ({"messages": [...]} for a
chat model), and the full model writes the answers first. A run that was interrupted goes on when
the command is given again.

"""

_EXAMPLES = """\
  fathom train exits --data prompts.jsonl --self-distill --tune exit --exit-layer 5 \\
      --exit-layers 3 --out my-adapter --work-dir run
  fathom train exits --data task.jsonl --tune lora --exit-layer 10 --kd dyna --out my-task \\
      --work-dir run2
  fathom serve --adapter my-adapter
"""


def add_parser(commands: Any) -> None:
    """Declare the options."""
    train = add_command(commands, "train", _needs_target, about="train exits", examples=_EXAMPLES)
    targets = train.add_subparsers(metavar="TARGET")
    parser = targets.add_parser(
        "exits",
        help="train an adapter",
        description=_ABOUT,
        epilog="examples:\n" + _EXAMPLES,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, metavar="FILE", help="examples, or prompts"
    )
    parser.add_argument(
        "--heldout", type=Path, nargs="+", metavar="FILE", help="default: a twentieth of the data"
    )
    parser.add_argument(
        "--self-distill", action="store_true", help="the full model answers the prompts first"
    )
    parser.add_argument(
        "--new-tokens", type=int, default=160, metavar="N", help="of an answer (default: 160)"
    )
    parser.add_argument(
        "--work-dir", type=Path, required=True, metavar="DIR", help="answers, checkpoints, MLflow"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the adapter")
    parser.add_argument("--name", help="the adapter's name (default: that of --out)")
    parser.add_argument("--mlflow", default="", metavar="URI", help="tracking server, or `none`")
    _add_shape(parser)
    _add_recipe(parser)
    _add_machine(parser)
    probe.add_parser(targets)
    train_multi_exit.add_parser(targets)


def _add_shape(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("shape")
    add = group.add_argument
    add("--model", default=DEFAULT_MODEL, help=f"default: {DEFAULT_MODEL}")
    add("--tune", choices=("exit", "lora", "full"), default="lora", help="default: lora")
    add("--exit-layer", type=int, required=True, metavar="K", help="layers that both paths share")
    add("--exit-layers", type=int, default=0, metavar="M", help="layers of the shallow path alone")
    add("--lora-rank", type=int, default=64, metavar="R", help="default: 64")
    add("--lora-alpha", type=int, default=128, metavar="A", help="default: 128")
    add("--subset", type=int, default=4096, metavar="N", help="tokens that the head scores; 0: all")
    add("--no-head-map", action="store_true", help="the head is a norm alone")
    add("--max-length", type=int, default=1024, metavar="N", help="tokens of an example")


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("recipe")
    add = group.add_argument
    add("--steps", type=int, default=1000, metavar="N", help="default: 1000")
    add("--batch-tokens", type=int, default=4096, metavar="N", help="default: 4096")
    add("--accumulate", type=int, default=1, metavar="N", help="batches a step")
    add("--learning-rate", type=float, default=1e-4, metavar="X", help="default: 1e-4")
    add("--warmup", type=int, default=50, metavar="N", help="steps (default: 50)")
    add("--weight-decay", type=float, default=0.01, metavar="X")
    add("--deep-rate", type=float, default=1.0, metavar="X", help="on the rate of deep layers")
    add(
        "--kd",
        choices=("none", "last", "unif", "dyna", "logits"),
        default="none",
        help="FREE's on states, or the full path's probabilities",
    )
    add("--kd-weight", type=float, default=0.5, metavar="X", help="its weight (default: 0.5)")
    add("--hold", type=float, default=0.0, metavar="X", help="weight of KL(original || tuned)")
    add("--no-deep-ce", action="store_true", help="train the full path by --hold alone")
    add("--no-exit-loss", action="store_true", help="plain fine-tuning, to compare with")
    add("--layer-dropout", type=float, default=0.0, metavar="P", help="LayerSkip's p_max")
    add("--curriculum", type=float, default=0.0, metavar="X", help="share of steps (LayerSkip)")
    add("--check-every", type=int, default=100, metavar="N", help="steps between checks")
    add("--seed", type=int, default=0)


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    add = group.add_argument
    add("--device", default="cpu", help="torch device (default: cpu)")
    add("--threads", type=int, default=0, metavar="N", help="torch threads; 0: torch's own choice")
    add("--workers", type=int, default=1, metavar="N", help="processes, through Ray Train")
    add("--recompute", action="store_true", help="less memory for a second forward pass")


def _needs_target(args: argparse.Namespace) -> int:
    raise UsageError(
        "say what to do: fathom train exits, probe or multi-exit (--help shows the options)."
    )


def run(args: argparse.Namespace) -> int:
    """Write answers where asked, train, and write the adapter."""
    for name in ("steps", "batch_tokens", "accumulate", "exit_layer", "workers", "new_tokens"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise UsageError(f"--{option} must be at least 1, got {getattr(args, name)}.")
    missing = [path for path in (*args.data, *(args.heldout or ())) if not path.is_file()]
    if missing:
        raise UsageError(f"{missing[0]}: no such file; --data and --heldout take JSON lines.")
    plan = _plan(args)
    plan.validate()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    data, heldout = list(args.data), list(args.heldout or ())
    if args.self_distill:
        data = [_answers(args, path) for path in data]
        heldout = [_answers(args, path) for path in heldout]

    import torch

    from fathom.models.resolve import resolve_model
    from fathom.models.tokenizer import load_tokenizer
    from fathom.training.examples import read_examples
    from fathom.training.exits import split_heldout

    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(resolve_model(args.model))
    examples = read_examples(data, tokenizer, max_length=args.max_length)
    if heldout:
        kept = read_examples(heldout, tokenizer, max_length=args.max_length)
    else:
        examples, kept = split_heldout(examples)
    targets = sum(e.num_targets for e in examples)
    print(
        f"{len(examples)} examples, {targets} targets; {len(kept)} held out", file=sys.stderr
    )  # fmt: skip
    return _train(args, plan, examples, kept)


def _train(args: argparse.Namespace, plan: Any, examples: Any, heldout: Any) -> int:
    from fathom.training.workers import train_on_workers

    outcome_folder = train_on_workers(
        plan,
        examples,
        heldout,
        args.work_dir,
        workers=args.workers,
        threads=args.threads,
        mlflow_uri=args.mlflow,
        out=args.out,
    )
    print(outcome_folder)
    return 0


def _plan(args: argparse.Namespace) -> Any:
    from fathom.training.exits import ExitTraining
    from fathom.training.model import Shape
    from fathom.training.objective import TrainSettings

    fields = TrainSettings.__dataclass_fields__
    settings = {name: getattr(args, name) for name in fields if hasattr(args, name)}
    return ExitTraining(
        name=args.name or args.out.name,
        model=args.model,
        shape=Shape(
            exit_layer=args.exit_layer,
            exit_layers=args.exit_layers,
            tune=args.tune,
            lora_rank=args.lora_rank,
            lora_alpha=args.lora_alpha,
            head_adapter=not args.no_head_map,
        ),
        settings=TrainSettings(
            **settings, deep_ce=not args.no_deep_ce, exit_loss=not args.no_exit_loss
        ),
        subset=args.subset,
        device=args.device,
        recompute=args.recompute,
    )


def _answers(args: argparse.Namespace, path: Path) -> Path:
    """The full model's answers to a file of prompts; an interrupted job goes on."""
    from rich.console import Console

    from fathom.commands.batch import run_batch
    from fathom.commands.prompts import encode_prompt, read_prompts
    from fathom.commands.records import ResultsFile
    from fathom.config import EngineConfig
    from fathom.engine.engine import Engine
    from fathom.types import AcceptMode, ComputePolicy, Request, SamplingParams

    out: Path = args.work_dir / f"{path.stem}.answers.jsonl"
    prompts = read_prompts(path)
    compute = ComputePolicy(mode=AcceptMode.FULL)
    sampling = SamplingParams(max_tokens=args.new_tokens)
    job = {
        "prompts": [dataclasses.asdict(prompt) for prompt in prompts],
        "model": args.model,
        "sampling": dataclasses.asdict(sampling),
    }
    results = ResultsFile(out, job, len(prompts), resume=True)
    if results.is_complete:
        return out
    notes = Console(stderr=True)
    engine = Engine.from_config(
        EngineConfig(
            model=args.model, adapter="none", compute=compute, threads=args.threads,
            device=args.device,
        )
    )  # fmt: skip
    encoded = {i: encode_prompt(engine.tokenizer, prompt) for i, prompt in enumerate(prompts)}
    requests = {
        i: Request(request_id=str(i), prompt_token_ids=ids, sampling=sampling, compute=compute)
        for i, ids in encoded.items()
        if i not in results.done
    }
    domains = {i: prompt.domain or path.stem for i, prompt in enumerate(prompts)}
    if failed := run_batch(
        engine, requests, results, total=len(prompts), notes=notes, domains=domains
    ):
        raise RuntimeError(f"{failed} of {len(prompts)} answers failed; see {out}")
    return out
