"""Getting the contenders ready: our engine, a row for each mode and width, and the peers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fathom.bench.measure import FathomContender, Prompts
from fathom.bench.peers import PeerUnavailable, peer
from fathom.bench.peers_env import find_environment
from fathom.bench.peers_report import Entry
from fathom.bench.peers_weights import Weights
from fathom.bench.peers_worker import PeerContender, start_peer
from fathom.config import EngineConfig
from fathom.engine.engine import Engine
from fathom.types import ComputePolicy

WIDTHS = {"float32": 32, "bfloat16": 16, "float16": 16}
"""Bits of a weight, by ``EngineConfig.dtype``."""
QUANTIZATIONS = {8: "int8", 4: "int4"}
"""Bits of a weight -> ``EngineConfig.quantization``."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What is the same for all contenders.

    Attributes:
        prompts: token ids. batches: sizes that will be run. new_tokens: most of an answer.
        pad_token_id: any token, for those who pad.
    """

    weights: Weights
    dtype: str
    device: str
    threads: int
    prompts: Prompts
    batches: Sequence[int]
    new_tokens: int
    pad_token_id: int

    def for_worker(self) -> dict[str, Any]:
        """See ``peer_protocol.serve``."""
        longest = max(map(len, self.prompts)) + self.new_tokens
        return {
            "dtype": self.dtype,
            "device": self.device,
            "threads": self.threads,
            "max_batch": max(self.batches),
            "max_model_len": -(-longest // 64) * 64,
            "pad_token_id": self.pad_token_id,
        }


def own_entries(
    config: EngineConfig, modes: Mapping[str, ComputePolicy], bits: Sequence[int]
) -> tuple[list[Entry], list[Engine]]:
    """Our engine once for each width, and its modes.

    Args:
        config: of the width that is its dtype's own. modes: how requests are decided, by label.
        bits: widths, each the dtype's own or one of ``QUANTIZATIONS``.

    Raises:
        ConfigError, ModelError: as the engine does.
    """
    entries, engines = [], []
    for width in bits:
        changes: dict[str, Any] = {}
        if width != WIDTHS[config.dtype]:
            changes["quantization"] = QUANTIZATIONS[width]
        own = dataclasses.replace(config, **changes)
        own.validate()
        engine = Engine.from_config(own)
        engines.append(engine)
        for label, compute in modes.items():
            contender = FathomContender(engine, compute, label)
            entries.append(Entry(contender, width, own.dtype, engine.stage_costs))
    return entries, engines


def peer_entry(
    name: str,
    setting: Setting,
    reference: Entry,
    *,
    root: Path,
    pythons: Mapping[str, Path],
    scratch: Path,
    progress: Callable[[str], None],
) -> tuple[Entry, PeerContender]:
    """Install a peer if need be, start its worker, and run each batch size for two tokens.

    Args:
        reference: a row of our own. root, pythons, progress: see ``find_environment``.
        scratch: see ``PeerContender``.

    Raises:
        PeerUnavailable: why it cannot take part.
    """
    chosen, weights = peer(name, setting.device), setting.weights
    path, bits, dtype = weights.directory, WIDTHS[setting.dtype], setting.dtype
    if chosen.gguf:
        if weights.gguf is None or weights.kept is None:
            raise PeerUnavailable(weights.no_gguf)
        if setting.device != "cpu":
            raise PeerUnavailable("it is built for the CPU; leave --device out to have it.")
        path, bits, dtype = weights.gguf, weights.kept.bits, "gguf"
    python = find_environment(chosen, root, pythons, progress)

    def try_out(contender: PeerContender) -> None:
        for batch in setting.batches:
            contender.run(setting.prompts[:batch], batch, 2)

    settings = {**setting.for_worker(), "weights": str(path)}
    contender = start_peer(chosen, python, settings, scratch, try_out=try_out)
    contender.about["python"] = str(python)
    return Entry(contender, bits, dtype, reference.costs, peer=name), contender
