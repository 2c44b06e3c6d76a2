"""The connector's client of the KV store, on a real Ray, without vLLM."""

from __future__ import annotations

import time

import numpy as np
import pytest

from fathom.kvstore.ray_store import RayKVStore, start_store, stop_store
from fathom.vllm import kv_client
from fathom.vllm.kv_client import StoreClient
from tests.ray_fixtures import TestServer

NAME = "test-vllm-client"
KEYS = [b"the only key of it"]


@pytest.mark.integration
def test_a_store_is_found_when_it_comes_and_again_when_it_is_another(
    server: TestServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kv_client, "RETRY_S", 0.2)
    client = StoreClient("", NAME)
    client.connect()
    assert client() is None
    assert f"no KV store '{NAME}'" in caplog.text
    seen = []
    for _ in range(2):
        shards = start_store(NAME, shards=1, budget_bytes=1 << 20)
        try:
            RayKVStore(shards).publish(KEYS, [np.ones(1000, np.uint8)])
            deadline = time.monotonic() + 20
            while (store := client()) is None or not len(store.lookup(KEYS)):
                assert time.monotonic() < deadline, "the store is not found"
                time.sleep(0.05)
            time.sleep(1)
            assert client() is store  # the same store is not connected to twice
            seen.append(store)
        finally:
            stop_store(NAME, shards=1)
    assert seen[0] is not seen[1]
