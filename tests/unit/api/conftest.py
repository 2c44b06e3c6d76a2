"""A real model, tiny and random, behind the real engine and the real application, in process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from fathom.api.app import create_app
from fathom.api.auth import digest
from fathom.api.convert import Defaults
from fathom.api.local import LocalBackend
from fathom.api.service import Service
from fathom.config import EngineConfig
from fathom.engine.async_engine import AsyncEngine
from fathom.models.tokenizer import Tokenizer, load_tokenizer
from fathom.types import ComputePolicy
from tests.tiny_models import tiny_model

__all__ = ["tiny_model"]

KEY = "unit-key"
MODEL = "tiny"


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="session")
def engine(tiny_model: Path) -> AsyncEngine:
    return AsyncEngine.from_config(
        EngineConfig(
            model=str(tiny_model),
            dtype="float32",
            threads=1,
            kv_cache_bytes=4 << 20,
            pause_drafting=False,  # depths must not depend on speed
            exit_layer=2,
            adapter="none",
        )
    )


@pytest.fixture(scope="session")
def service(engine: AsyncEngine, tokenizer: Tokenizer) -> Service:
    return Service(
        backend=LocalBackend(engine, interval_s=0.0),
        tokenizer=tokenizer,
        model_name=MODEL,
        defaults=Defaults(compute=ComputePolicy(), timeout_s=60),
    )


@pytest.fixture(scope="session")
def client(service: Service) -> Iterator[TestClient]:
    app = create_app(service, key_digests=[digest("other"), digest(KEY)], max_body_bytes=10_000)
    with TestClient(
        app, headers={"Authorization": f"Bearer {KEY}"}, raise_server_exceptions=False
    ) as client:
        yield client
