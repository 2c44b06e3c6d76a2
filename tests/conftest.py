"""What holds for every test: no hub, one thread, hypothesis without deadlines, GPU tests apart.

And which tests a worker of pytest-xdist takes together, where there are several.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

# Before anything imports torch or huggingface_hub. Two busy processes with a thread for each core
# slow each other down many times over.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest

# Time limits of single examples fail on a busy machine and say nothing about the code.
hypothesis.settings.register_profile("fathom", deadline=None, print_blob=True)
hypothesis.settings.register_profile(
    "ci", parent=hypothesis.settings.get_profile("fathom"), derandomize=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "fathom")


HERE = Path(__file__).parent
STARTS_RAY = ("test_chaos", "test_disaggregated", "test_startup", "test_study", "test_tune")
"""Files (beginnings of names) with tests that start a Ray of their own, in another process."""


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _mark_gpu(items)
    if config.getoption("loadgroup", False):  # a worker of `pytest -n N --dist loadgroup`
        for item in items:
            item.add_marker(pytest.mark.xdist_group(_group(item)))
        items.sort(key=_turn)


def _group(item: pytest.Item) -> str:
    """What shares the one server of ``ray_fixtures`` is one group; else a file is."""
    return "server" if _uses_server(item) else str(item.path.relative_to(HERE))


def _turn(item: pytest.Item) -> int:
    """The longest group first, and short ones last, so that workers end together.

    Tests that start a Ray of their own come after others without one: on a machine that never ran
    Ray, two that start at once would each write Ray's token.
    """
    if _uses_server(item):
        return 0
    if HERE / "unit" in item.path.parents:
        return 3
    return 2 if item.path.name.startswith(STARTS_RAY) else 1


def _uses_server(item: pytest.Item) -> bool:
    names = getattr(item, "fixturenames", ())
    return "server" in names and HERE / "unit" not in item.path.parents


def _mark_gpu(items: list[pytest.Item]) -> None:
    folder = HERE / "gpu"
    for item in items:
        if folder in item.path.parents:
            item.add_marker(pytest.mark.gpu)
    if shutil.which("nvidia-smi") is None:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
