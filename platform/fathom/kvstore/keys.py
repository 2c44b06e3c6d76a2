"""Keys of KV blocks: a chain of hashes over everything that the block's content depends on."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

BlockKey = bytes

KEY_BYTES = 16
"""Length of a key."""


@dataclass(frozen=True, slots=True)
class KeyRoot:
    """What the KV blocks of a stage depend on beside the tokens.

    Leaving any of these out has given other systems wrong hits, so none has a default.

    Attributes:
        weights_digest: digest of the model's weights.
        adapter: identity of the adapter applied to them, empty for none.
        first_layer, last_layer: the stage's layer range [first, last).
        dtype: dtype of the blocks.
        salt: keeps tenants apart.
    """

    weights_digest: str
    adapter: str
    first_layer: int
    last_layer: int
    dtype: str
    salt: str

    def key(self) -> BlockKey:
        """The parent key of a sequence's first block."""
        fields = (
            self.weights_digest,
            self.adapter,
            str(self.first_layer),
            str(self.last_layer),
            self.dtype,
            self.salt,
        )
        digest = hashlib.blake2b(digest_size=KEY_BYTES)
        for field in fields:
            encoded = field.encode()
            # Lengths keep ("ab", "c") apart from ("a", "bc").
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
        return digest.digest()


def extend_keys(
    keys: list[BlockKey], root: KeyRoot, token_ids: Sequence[int], block_size: int
) -> None:
    """Append the keys of the full blocks of ``token_ids`` that ``keys`` does not cover yet.

    Args:
        keys: keys of the leading full blocks, in order; extended in place.
        token_ids: the sequence from its first token on.
        block_size: tokens a block.
    """
    parent = keys[-1] if keys else root.key()
    for index in range(len(keys), len(token_ids) // block_size):
        block = array("q", token_ids[index * block_size : (index + 1) * block_size])
        parent = hashlib.blake2b(parent + block.tobytes(), digest_size=KEY_BYTES).digest()
        keys.append(parent)
