from __future__ import annotations

from pathlib import Path

import pytest
from openai import OpenAI

from tests.command_line import fathom, fathom_here
from tests.ray_fixtures import TestServer, server
from tests.tiny_models import tiny_model

__all__ = ["fathom", "fathom_here", "server", "tiny_model"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def openai(server: TestServer) -> OpenAI:
    return server.openai()
