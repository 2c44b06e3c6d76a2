"""Which blocks of the KV store hold what vLLM's cache holds: keys, layers, bytes.

A Fathom replica keeps two blocks for the same tokens: layers [0, k) in its shallow stage's chain,
layers [k, L) in its deep stage's. vLLM runs all L layers, so it reads and writes both.

A shallow block of Fathom's holds exit-layer hidden states behind its keys and values, and where
requests draft through an adapter's own exit layers, those layers' keys and values as well. vLLM
computes neither. It reads the layers that it shares from either kind; what it writes is the plain
kind, without states (``fathom.engine.shared`` says what a Fathom replica does with it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fathom.config import ConfigError, EngineConfig
from fathom.engine.build import adapter_of
from fathom.engine.plan import SplitPlan, exit_layer_of, model_digest
from fathom.kvstore.keys import BlockKey, KeyRoot, extend_keys
from fathom.models.config import ModelConfig
from fathom.models.files import weights_digest
from fathom.models.resolve import resolve_model

SETTINGS = ("model", "dtype", "adapter", "exit_layer", "block_size")
"""Fields of ``EngineConfig`` that decide over keys."""


class Chains(NamedTuple):
    """Something of each chain in which a prefix may lie.

    Fields: ``deep`` of layers [k, L); ``plain`` of layers [0, k); ``drafting`` of layers [0, k)
    with an adapter's exit layers behind them, equal to ``plain`` where there are none.
    """

    deep: Any
    plain: Any
    drafting: Any


@dataclass(frozen=True, slots=True)
class KVLayout:
    """A model's blocks in the store, as Fathom engines of the same settings read and write them.

    Attributes:
        plan: how those engines split the model.
    """

    plan: SplitPlan

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> KVLayout:
        """From the settings of the Fathom engines; see ``SETTINGS``.

        Raises:
            ConfigError: for a setting that cannot be used, or one that makes their keys and values
                others than vLLM's.
            ModelError: for a model or an adapter that cannot be found.
        """
        config = EngineConfig(**{name: settings[name] for name in SETTINGS if name in settings})
        config.validate()
        directory = resolve_model(config.model)
        digest = weights_digest(directory)
        adapter = adapter_of(config, digest)
        if adapter is not None and adapter.changes_model:
            raise ConfigError(
                f"adapter {config.adapter!r} changes the model's own weights, which vLLM does not "
                "apply: serve what `fathom export` writes of it in both."
            )
        model = ModelConfig.from_directory(directory)
        plan = SplitPlan.make(
            config,
            model,
            exit_layer=exit_layer_of(config, model, adapter),
            weights_digest=model_digest(digest, model, config.bits),
            adapter=adapter,
        )
        return cls(plan)

    @property
    def block_size(self) -> int:
        """Tokens of a block in the store."""
        return self.plan.config.block_size

    @property
    def dtype(self) -> torch.dtype:
        """Of the blocks."""
        return self.plan.dtype

    @property
    def num_layers(self) -> int:
        """L, of the model."""
        return self.plan.model.num_layers

    @property
    def num_shallow(self) -> int:
        """k, layers in a shallow block that are the model's."""
        return self.plan.exit_layer

    @property
    def num_unused(self) -> int:
        """Layers behind those in every shallow block: an adapter's own, which the plain kind lacks.

        An engine's pool has room for them in all blocks; in the plain kind nothing reads them.
        """
        return self.plan.exit_layers

    @property
    def layer_shape(self) -> tuple[int, int, int]:
        """Of one layer in a block: [2 * num_kv_heads, block_size, head_dim], keys first."""
        model = self.plan.model
        return 2 * model.num_kv_heads, self.block_size, model.head_dim

    def extend(self, keys: Chains, token_ids: Sequence[int], salt: str) -> None:
        """Append the keys of the full blocks of a prefix that ``keys`` does not cover yet.

        Args:
            keys: a list of keys for each chain; where no exit layers are, two of them are one list.
        """
        for chain, root in zip(keys, self._roots(salt), strict=True):
            extend_keys(chain, root, token_ids, self.block_size)

    def no_keys(self) -> Chains:
        """Empty lists for ``extend``."""
        _, plain, drafting = self._roots("")
        own: list[BlockKey] = []
        return Chains([], own, own if plain == drafting else [])

    def _roots(self, salt: str) -> tuple[KeyRoot, KeyRoot, KeyRoot]:
        plain, deep = self.plan.roots(salt, drafts=False)
        drafting, _ = self.plan.roots(salt, drafts=True)
        return deep, plain, drafting
