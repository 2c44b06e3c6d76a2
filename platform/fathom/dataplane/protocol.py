"""What is said in an exchange: who speaks, what a flush holds, what comes back.

An exchange is one ``DoExchange`` call of Arrow Flight. The client's descriptor holds a ``Hello``;
the server answers with a ``Lease`` of blocks, or refuses. Then each record batch of the client is a
flush, one row a sequence, and each of the server is the reply to one, in any order. A server that
has nothing to say for a second says so: a peer that is silent for longer hangs. ``messages`` has
the form of all this.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from fathom.engine.deep import FlushItem, FlushResult
from fathom.kvstore.keys import BlockKey

VERSION = 3


class ProtocolError(ValueError):
    """A message that cannot be read, or a peer that must not be talked to."""


@dataclass(frozen=True, slots=True)
class Hello:
    """What both ends must agree on, and how many blocks the client would like.

    Attributes:
        version: of the protocol. weights_digest, adapter: of the model, adapter empty unless it
            changes the full path. first_layer, last_layer: the deep stage's. dtype: of states, keys
            and logits. block_size: tokens a block. hidden_size, vocab_size: of the model.
        num_blocks: wanted by the client.
    """

    version: int
    weights_digest: str
    adapter: str
    first_layer: int
    last_layer: int
    dtype: str
    block_size: int
    hidden_size: int
    vocab_size: int
    num_blocks: int

    def encode(self) -> bytes:
        """For the descriptor."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, data: bytes | None) -> Hello:
        """Read a descriptor.

        Raises:
            ProtocolError: for something else, a later version among it.
        """
        try:
            value = json.loads(data or b"")
            version = value["version"]
            if version != VERSION:
                raise ProtocolError(
                    f"the peer speaks version {version} of the protocol, this end {VERSION}: "
                    "install the same fathom-serve on both."
                )
            return cls(**value)
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, ProtocolError):
                raise
            raise ProtocolError(f"the peer's greeting cannot be read: {error}") from error

    def check(self, other: Hello) -> None:
        """Check that a client's greeting fits this deep stage.

        Raises:
            ProtocolError: naming the first field that differs, with both values.
        """
        for field in fields(self):
            own, theirs = getattr(self, field.name), getattr(other, field.name)
            if field.name != "num_blocks" and own != theirs:
                raise ProtocolError(
                    f"{field.name} is {own!r} at the deep replica and {theirs!r} at the shallow "
                    "one: deploy both from the same settings."
                )


@dataclass(frozen=True, slots=True)
class BlockOp:
    """Something to do with blocks before a flush, in order: copy, or zero without a source."""

    target: int
    source: int | None = None


@dataclass(frozen=True, slots=True)
class KeyedBlocks:
    """Blocks that come from the KV store or go there.

    Attributes:
        keys: of one chain from its first block on; ``blocks`` are those of the last ones.
    """

    blocks: Sequence[int]
    keys: Sequence[BlockKey]


@dataclass(frozen=True, slots=True)
class Flush:
    """A flush as it arrives.

    Attributes:
        number: counts up from 0 in an exchange. ops: to be done first, in order.
        publish: what to publish then, before rows are run. load: what to load, in place of rows.
    """

    number: int
    ops: Sequence[BlockOp]
    items: Sequence[FlushItem]
    publish: Sequence[KeyedBlocks] = ()
    load: KeyedBlocks | None = None


@dataclass(frozen=True, slots=True)
class Lease:
    """The server's first words.

    Attributes:
        num_blocks: blocks 1 to ``num_blocks`` are the client's to use.
        costs: (rows, seconds) of a deep pass, as measured at its start.
    """

    num_blocks: int
    costs: Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Reply:
    """What comes back for a flush.

    Attributes:
        number: of the flush. result: None where it has failed, with ``error``.
        loaded: blocks that were loaded.
        pass_s: seconds of the deep pass that ran it, with whatever else ran in that pass.
        queue_s: seconds that it waited for its turn.
    """

    number: int
    result: FlushResult | None
    error: str = ""
    loaded: int = 0
    pass_s: float = 0.0
    queue_s: float = 0.0
