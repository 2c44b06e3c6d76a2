"""Flame graph of a decode step, on torch's kernels and on ours, drawn to one scale.

    pip install 'austin-dist<4'       # a sampling profiler; version 4 needs glibc 2.38
    python -m experiments.speed.flame --plot decode.png         # and --quantization int4

Austin samples the Python stack of ``experiments.speed.decode`` in a process of its own, once with
``FATHOM_KERNELS=off`` and once without. Only the timed steps count. A call into a kernel is the
last frame of its stack, so what a block's own width is beyond its callees' is time in C++.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

ROOT_FRAME = "timed_steps"
SIDES = (("torch's kernels", "off"), ("our kernels", "on"))
COLORS = {
    "engine": "#f2c14e", "models": "#f08a4b", "attention": "#8fb8de", "kernels": "#d95d39",
    "torch": "#9a94bc",
}  # fmt: skip
OTHER_COLOR = "#cccccc"
INCHES_A_LEVEL, CHARS_ACROSS = 0.22, 190


@dataclass
class Block:
    """Samples of one function called from one stack.

    Attributes:
        room: package that the function lives in, for its colour.
    """

    name: str
    room: str
    microseconds: int = 0
    callees: dict[str, Block] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """Levels from here up."""
        return 1 + max((each.depth for each in self.callees.values()), default=0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Sample both sides, draw."""
    args, rest = _options(arguments)
    if shutil.which("austin") is None:
        print("austin is not on PATH: pip install 'austin-dist<4'", file=sys.stderr)
        return 2
    sides = []
    for name, kernels in SIDES:
        text, milliseconds, account = _sample(kernels, args.interval_us, rest)
        print(f"{name}: {account}")
        sides.append((name, stacks_of(text), milliseconds))
    draw(sides, args.plot)
    return 0


def stacks_of(text: str) -> Block:
    """The timed steps' samples as a tree, from Austin's lines.

    Args:
        text: lines ``P<pid>;T<thread>;<file>:<function>:<line>;... <microseconds>``.
    """
    root = Block("step", "engine")
    for line in text.splitlines():
        stack, _, amount = line.rpartition(" ")
        if not stack.startswith("P") or not amount.isdigit():
            continue
        frames = list(_frames(stack))
        names = [name for name, _ in frames]
        if ROOT_FRAME not in names:
            continue
        block = root
        block.microseconds += int(amount)
        for name, room in frames[names.index(ROOT_FRAME) + 1 :]:
            block = block.callees.setdefault(name, Block(name, room))
            block.microseconds += int(amount)
    return root


def draw(sides: Sequence[tuple[str, Block, float]], path: Path) -> None:
    """Draw one graph a side, as wide as its step is long.

    Args:
        sides: title, samples, milliseconds a step.
    """
    longest = max(milliseconds for _, _, milliseconds in sides)
    levels = [block.depth for _, block, _ in sides]
    figure = Figure(figsize=(14, sum(levels) * INCHES_A_LEVEL + 1.6), layout="constrained")
    axes = figure.subplots(len(sides), 1, sharex=True, height_ratios=levels, squeeze=False)[:, 0]
    for (title, root, milliseconds), own in zip(sides, axes, strict=True):
        scale = milliseconds / max(root.microseconds, 1)
        _draw_block(own, root, 0.0, 0, scale, longest)
        own.set_title(f"{title}: {milliseconds:.1f} ms a step", loc="left", fontsize=10)
        own.set(xlim=(0, longest), ylim=(0, root.depth), yticks=[])
        own.spines[["top", "right", "left"]].set_visible(False)
    axes[-1].set_xlabel("milliseconds of a decode step")
    figure.savefig(path, dpi=110)


def _draw_block(
    axes: Axes, block: Block, left: float, level: int, scale: float, longest: float
) -> None:
    width = block.microseconds * scale
    color = COLORS.get(block.room, OTHER_COLOR)
    axes.add_patch(
        Rectangle((left, level), width, 0.94, facecolor=color, edgecolor="white", lw=0.3)
    )
    room = int(width / longest * CHARS_ACROSS)
    if room >= 4:
        axes.text(left + longest / 700, level + 0.42, block.name[:room], fontsize=6.5, va="center")
    for callee in sorted(block.callees.values(), key=lambda each: each.name):
        _draw_block(axes, callee, left, level + 1, scale, longest)
        left += callee.microseconds * scale


def _frames(stack: str) -> Iterator[tuple[str, str]]:
    """Function and room of each frame, outermost first."""
    for frame in stack.split(";")[2:]:
        parts = frame.rsplit(":", 2)
        if len(parts) != 3:
            continue
        file, function, _ = parts
        found = re.search(r"fathom/(\w+)/|site-packages/(torch)/", file)
        yield function, next(filter(None, found.groups()), "") if found else ""


def _sample(kernels: str, interval_us: int, rest: Sequence[str]) -> tuple[str, float, str]:
    """Austin's lines, milliseconds a step, and what ``decode`` said of them."""
    with tempfile.TemporaryDirectory() as folder:
        samples = Path(folder) / "samples"
        command = [
            "austin",
            "-t",
            "10s",
            "-i",
            str(interval_us),
            "-o",
            str(samples),
            sys.executable,
        ]
        done = subprocess.run(
            [*command, "-m", "experiments.speed.decode", *rest],
            env={**os.environ, "FATHOM_KERNELS": kernels}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        found = re.search(r"^.*: ([\d.]+) ms a step.*$", done.stdout, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"decode ended with {done.returncode}: {done.stderr[-2000:]}")
        return samples.read_text(errors="replace"), float(found[1]), found[0]


def _options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter,
        epilog="All other options are those of experiments.speed.decode.",
    )  # fmt: skip
    parser.add_argument("--plot", type=Path, required=True, metavar="FILE", help="picture")
    parser.add_argument("--interval-us", type=int, default=500, metavar="N", help="default: 500")
    return parser.parse_known_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
