"""Child processes that end with their parent, however it ends.

vLLM's engine runs in a process of its own, which does not notice when the replica is killed: it
would keep its memory, and its GPU, for good. (vLLM's workers do notice the end of their engine.)
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

# The descriptors name processes, not numbers that may be others' by then.
_WATCH = """
import os, signal, sys
found = []
for pid in sys.argv[1:]:
    try:
        found.append(os.pidfd_open(int(pid)))
    except OSError:
        pass
sys.stdin.buffer.read()
for fd in found:
    try:
        signal.pidfd_send_signal(fd, signal.SIGKILL)
    except OSError:
        pass
"""


def children() -> set[int]:
    """Ids of the processes that this one has started, and that are there still."""
    own = str(os.getpid())
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state = (path / "stat").read_text()
        except OSError:  # gone meanwhile
            continue
        # The name before the last bracket may hold anything.
        if state.rpartition(")")[2].split()[1] == own:
            found.add(int(path.name))
    return found


def tie(pids: Iterable[int]) -> subprocess.Popen[bytes]:
    """Kill processes as soon as this one is gone.

    A process beside this one holds the other end of a pipe, which closes when this one ends.

    Returns:
        that process; who closes its ``stdin`` has the processes killed at once.
    """
    return subprocess.Popen(
        [sys.executable, "-S", "-c", _WATCH, *map(str, sorted(pids))],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
