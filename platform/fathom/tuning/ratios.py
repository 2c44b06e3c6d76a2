"""Replica ratios: how many replicas of each kind share an application's cores."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fathom.settings import ConfigError

ONE_EACH = "1:1"
FUSED = "fused"
MOST = 64
_FORM = re.compile(r"([1-9]\d?):([1-9]\d?)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Replicas:
    """Replicas of an application.

    Attributes:
        shallow: fused ones where ``deep`` is 0. cpus: cores of each, of either kind.
    """

    shallow: int
    deep: int
    cpus: float


def check_ratio(where: str, value: Any) -> None:
    """Check a ratio.

    Raises:
        ConfigError: naming ``where``, the value and the remedy.
    """
    if isinstance(value, str):
        found = _FORM.fullmatch(value)
        if value == FUSED or (found and max(map(int, found.groups())) <= MOST):
            return
    wanted = (
        f'{where} must be shallow and deep replicas, "N:M" with both from 1 to {MOST}, or {FUSED}'
    )
    if isinstance(value, int) and not isinstance(value, bool) and value >= 60:
        # YAML 1.1 takes two numbers with a colon between them for hours and minutes.
        raise ConfigError(
            f'{wanted}, got the number {value}: put it in quotes, "{value // 60}:{value % 60}".'
        )
    raise ConfigError(f"{wanted}, got {value!r}.")


def replicas_of(ratio: str, cpus: float) -> Replicas:
    """The replicas of a checked ratio; each gets an equal share of the cores.

    ``fused`` has as many replicas as there are whole cores, one at least.

    Args:
        cpus: cores of all replicas together.
    """
    if ratio == FUSED:
        count = max(1, int(cpus))
        return Replicas(count, 0, _share(cpus, count))
    shallow, deep = map(int, ratio.split(":"))
    return Replicas(shallow, deep, _share(cpus, shallow + deep))


def _share(cpus: float, count: int) -> float:
    """Rounded down to what Ray can count, so that all replicas together do not exceed ``cpus``."""
    return max(int(cpus / count * 1e4) / 1e4, 1e-4)


def serve_options(setting: Mapping[str, Any], cpus: float) -> str:
    """Options by which ``fathom serve`` runs what a served trial ran, but for the cores.

    Args:
        setting: of the trial. cpus: as of ``replicas_of``.
    """
    own = replicas_of(setting["replica_ratio"], cpus)
    options = (
        [f"--shallow-replicas {own.shallow}", f"--deep-replicas {own.deep}"]
        if own.deep
        else [f"--replicas {own.shallow}"]
    )
    options += [
        f"--{name.replace('_', '-')} {setting[name]}"
        for name in ("max_num_seqs", "flush_rule")
        if name in setting
    ]
    if setting.get("pause_drafting") is False:
        options.append("--no-pause-drafting")
    return " ".join(options)
