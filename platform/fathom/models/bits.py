"""How many bits the weights of each stage have, as settings say it."""

from __future__ import annotations

from typing import NamedTuple

_BITS = {"none": 0, "int8": 8, "int4": 4}
QUANTIZATIONS = tuple(_BITS)


class Bits(NamedTuple):
    """Bits of the weights in the layers of each stage; 0: those of the model's dtype."""

    shallow: int = 0
    deep: int = 0

    @classmethod
    def parse(cls, text: str) -> Bits:
        """Read ``int4``, ``int8`` or ``none``; of both stages, or ``SHALLOW:DEEP``.

        Raises:
            ValueError: for anything else.
        """
        parts = text.split(":")
        if len(parts) > 2 or any(part not in _BITS for part in parts):
            raise ValueError(text)
        return cls(_BITS[parts[0]], _BITS[parts[-1]])

    @property
    def name(self) -> str:
        """As ``parse`` reads it."""
        names = {bits: name for name, bits in _BITS.items()}
        shallow, deep = names[self.shallow], names[self.deep]
        return shallow if shallow == deep else f"{shallow}:{deep}"

    def of_layers(self, exit_layer: int, num_layers: int) -> list[int]:
        """Those of each layer of a model that is split at ``exit_layer``."""
        return [self.shallow] * exit_layer + [self.deep] * (num_layers - exit_layer)
