"""How soon λ of policy ``adaptive`` settles: every switch between any two of some traces.

python -m experiments.policies.switches multi30k.parquet scitldr.parquet spec_bench.parquet
"""

from __future__ import annotations

import argparse
from itertools import permutations
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fathom.compute import Confidence
from fathom.exits.bias import Method
from fathom.tuning.adaptive_replay import SETTLED_ROWS, switch
from fathom.tuning.rows import Measure, read_rows


def main() -> None:
    """Print a row for each switch and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("traces", type=Path, nargs="+")
    names = [each.value for each in (Confidence.SOFTMAX_GAP, Confidence.MAX_PROB)]
    parser.add_argument("--confidence", nargs="+", choices=names, default=names)
    args = parser.parse_args()
    traces = [read_rows(path) for path in args.traces]
    table = Table("confidence", "switch", "λ", "settled (median)", "most", "in time", "fine grid")
    within: list[float] = []
    for name in args.confidence:
        for first, second in permutations(traces, 2):
            found = switch(first, second, Measure(Confidence(name)), Method.EM)
            own = found.grid
            within.append(own.settled_in_time)
            table.add_row(
                name, f"{first.name} to {second.name}", f"{own.before:.3f} to {own.after:.3f}",
                str(own.settled_after), str(own.settled_worst), f"{own.settled_in_time:.0%}",
                f"{found.fine.settled_in_time:.0%}",
            )  # fmt: skip
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)
    share = sum(within) / len(within)
    print(f"{share:.1%} of {len(within)} x 20 switches settle within {SETTLED_ROWS} rows")


if __name__ == "__main__":
    main()
