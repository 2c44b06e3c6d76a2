"""Deep stages behind a real exchange on this machine, and engines over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trustme

from fathom.dataplane.client import RemoteDeepStage
from fathom.dataplane.protocol import VERSION, Hello
from fathom.dataplane.server import DeepServer
from fathom.dataplane.tls import Tls
from fathom.dataplane.worker import DeepWorker
from fathom.engine.deep import LocalDeepStage
from fathom.engine.engine import Engine
from fathom.kvstore.store import KVStore
from fathom.models.adapters import Adapter
from fathom.models.decoder import Decoder
from tests.unit.engine.conftest import (
    decoder,
    exit_adapter,
    make_engine_of,
    model_dir,
    one_thread,
)

__all__ = ["decoder", "exit_adapter", "model_dir", "one_thread"]

TOKEN = "of this deployment"


def hello_of(deep: LocalDeepStage, **changed: object) -> Hello:
    stage = deep._stage
    config = stage.decoder.config
    fields = {
        "version": VERSION,
        "weights_digest": "tiny",
        "adapter": "",
        "first_layer": stage.first,
        "last_layer": stage.last,
        "dtype": "float32",
        "block_size": stage.pool.block_size,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "num_blocks": stage.pool.num_blocks - 1,
    }
    return Hello(**{**fields, **changed})


class Deep:
    """A deep replica in this process: stage, worker and server."""

    def __init__(self, local: LocalDeepStage, max_rows: int = 64, **options) -> None:
        self.hello = hello_of(local)
        self.stage = local._stage
        self.worker = DeepWorker(local._stage, max_rows)
        self.server = DeepServer(
            self.worker, self.hello, token=TOKEN, shared=local._shared, **options
        )

    def connect(self, **options) -> RemoteDeepStage:
        hello = options.pop("hello", self.hello)
        peers = options.pop("peers", lambda: [self.server.address])
        return RemoteDeepStage(peers, hello, **{"token": TOKEN, **options})

    def close(self) -> None:
        self.server.close()
        self.worker.close()


@pytest.fixture(scope="session")
def make_engine(decoder: Decoder, model_dir: Path) -> Iterator[Callable[..., Engine]]:
    """As the engine's own tests have it, but every deep stage is at the far end of an exchange."""
    opened: list[Deep] = []
    clients: list[RemoteDeepStage] = []

    def make(
        num_blocks: int = 256,
        wrap_deep=None,
        trained: Adapter | None = None,
        store: KVStore | None = None,
        **fields,
    ):
        def remote(local: LocalDeepStage):
            opened.append(Deep(local))
            clients.append(opened[-1].connect())
            return wrap_deep(clients[-1]) if wrap_deep else clients[-1]

        return make_engine_of(decoder, model_dir, num_blocks, remote, trained, store, **fields)

    yield make
    for client in clients:
        client.close()
    for deep in opened:
        deep.close()


@pytest.fixture(scope="session")
def tls() -> tuple[Tls, Tls]:
    """For a server on 127.0.0.1, and for its clients."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
    server = Tls(chain, issued.private_key_pem.bytes())
    return server, Tls(authority.cert_pem.bytes())
