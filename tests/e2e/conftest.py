from __future__ import annotations

from pathlib import Path

import pytest
from openai import OpenAI

from tests.ray_fixtures import TestServer, server

__all__ = ["server"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def openai(server: TestServer) -> OpenAI:
    return server.openai()
