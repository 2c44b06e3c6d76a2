"""Prompts of a task as a file for ``fathom generate --prompts``, from the data in ``FATHOM_DATA``.

    python -m experiments.policies.prompts --task gsm8k --count 400 --out gsm8k.jsonl

The prompts are those of ``fathom eval``; none of their files was used to train an adapter.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from experiments.datasets import read_rows
from fathom.evaluation.tasks import TASKS, GenerationTask


def prompts(task: GenerationTask, count: int) -> list[str]:
    """The first ``count`` prompts of a task."""
    rows = read_rows(task.file, count)
    items = [task.parse(f"{task.file}:{number}", row) for number, row in enumerate(rows, 1)]
    return [task.template.format(text=item.text) for item in items]


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [name for name, task in TASKS.items() if isinstance(task, GenerationTask)]
    parser.add_argument("--task", choices=names, required=True)
    parser.add_argument("--count", type=int, default=400, help="default: 400")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    args = parser.parse_args()
    task = TASKS[args.task]
    assert isinstance(task, GenerationTask)
    lines = [
        json.dumps({"messages": [{"role": "user", "content": text}], "domain": task.name})
        for text in prompts(task, args.count)
    ]
    args.out.write_text("".join(line + "\n" for line in lines))
    print(f"{args.out}: {len(lines)} prompts")


if __name__ == "__main__":
    main()
