"""Which files of tests a worker of pytest-xdist takes together, and in which order.

``xdist_group`` marks would do, but pytest-xdist 3.8 writes them into names that pytest 9.2 does not
read any more.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SERVER = "server"
STARTS_RAY = ("test_chaos.py", "test_startup.py", "test_study.py", "test_tune.py")
"""Files with tests that start a Ray of their own, in another process."""


@cache
def group_of(path: Path) -> str:
    """Files that ask for the server of ``ray_fixtures`` are one group; else each is its own.

    Args:
        path: of a file of tests, absolute.
    """
    shares = HERE / "unit" not in path.parents and "server: TestServer" in path.read_text()
    return SERVER if shares else str(path)


def turn_of(path: Path) -> int:
    """The longest group is first, and short ones are last, so that workers end together.

    Tests that start a Ray of their own come after others without one: on a machine that never ran
    Ray, two that start at once would each write Ray's token.
    """
    if group_of(path) == SERVER:
        return 0
    if HERE / "unit" in path.parents:
        return 3
    return 2 if path.name in STARTS_RAY else 1


def make_scheduler(config: Any, log: Any) -> Any:
    """What deals out groups, each to one worker."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(Path(config.rootpath) / nodeid.split("::")[0])

    return Groups(config, log)
