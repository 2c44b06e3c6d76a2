"""Processes that end with the one that started them, however that ends."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from fathom.vllm.lifeline import children, tie

PARENT = """
import subprocess, sys, time
from fathom.vllm.lifeline import children, tie
before = children()
child = subprocess.Popen(["sleep", "300"])
assert children() - before == {child.pid}
tie(children() - before)
print(child.pid, flush=True)
time.sleep(300)
"""


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] not in ("Z", "X")


def wait_for_end(pid: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


def test_a_killed_parent_takes_its_children_along() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        time.sleep(0.5)
        assert is_running(child)
        parent.kill()
        wait_for_end(child)


def test_children_are_left_alone_as_long_as_the_parent_lives() -> None:
    child = subprocess.Popen(["sleep", "300"])
    assert child.pid in children()
    lifeline = tie([child.pid, 2**22 + 1])  # no process has the second
    time.sleep(1)
    assert child.poll() is None
    lifeline.communicate()
    assert child.wait(60) == -9
    assert child.pid not in children()
