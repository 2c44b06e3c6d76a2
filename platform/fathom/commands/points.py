"""Options that take operating points from a file."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from fathom.commands.options import UsageError, compute_policy, compute_values
from fathom.types import ComputePolicy, InvalidRequest

if TYPE_CHECKING:
    from fathom.tuning.operating_points import OperatingPoints


def add_point_options(parser: argparse.ArgumentParser) -> None:
    """Declare ``--operating-points`` and ``--operating-point``."""
    group = parser.add_argument_group("operating points")
    group.add_argument(
        "--operating-points",
        metavar="FILE",
        help="measured settings of this model and adapter, from `fathom calibrate fit`; --risk and "
        "--budget are resolved by its calibration data",
    )
    group.add_argument(
        "--operating-point",
        metavar="NAME",
        help="take this point of the file: exact, balanced, fast, or one of your own",
    )


def points_of(args: argparse.Namespace) -> OperatingPoints | None:
    """The file that the options name, if any.

    Raises:
        ConfigError: for one that cannot be used. UsageError: for a point without a file.
    """
    if args.operating_points is None:
        if args.operating_point is not None:
            raise UsageError(
                f"--operating-point {args.operating_point} needs --operating-points FILE; "
                "`fathom calibrate fit TRACE --out FILE` makes one."
            )
        return None
    from fathom.tuning.operating_points import load

    return load(Path(args.operating_points))


def compute_at(args: argparse.Namespace, points: OperatingPoints | None) -> ComputePolicy:
    """The checked compute policy that the options ask for; with points as a server resolves it.

    Raises:
        UsageError: naming the option at fault. InvalidRequest: for a value out of range.
    """
    if points is None:
        return compute_policy(args)
    from fathom.api.compute import resolve
    from fathom.api.schemas import ComputeOptions

    # Plain values: strict types take no members of enumerations.
    values = {name: getattr(v, "value", v) for name, v in compute_values(args).items()}
    try:
        return resolve(ComputeOptions(**values), None, ComputePolicy(), points)
    except InvalidRequest as error:
        text = re.sub(
            r"compute\.(\w+)", lambda found: "--" + found[1].replace("_", "-"), str(error)
        )
        raise UsageError(text) from error
