"""What holds for every test: no hub, one thread, hypothesis without deadlines, GPU tests apart."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path

# Before anything imports torch or huggingface_hub. Two busy processes with a thread for each core
# slow each other down many times over.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest

import deployments  # noqa: F401  sets what Serve reads when it is imported

# A shell's background jobs ignore Ctrl-C, and so would what tests start and interrupt.
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    and threading.current_thread() is threading.main_thread()
):
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Time limits of single examples fail on a busy machine and say nothing about the code.
hypothesis.settings.register_profile("fathom", deadline=None, print_blob=True)
hypothesis.settings.register_profile(
    "ci", parent=hypothesis.settings.get_profile("fathom"), derandomize=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "fathom")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent / "gpu"
    for item in items:
        if folder in item.path.parents:
            item.add_marker(pytest.mark.gpu)
    if shutil.which("nvidia-smi") is None:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
