"""Virtual environments of peers: made once with pip, checked and used again afterwards."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping
from pathlib import Path

from filelock import FileLock

from fathom.bench.peers import Package, Peer, PeerUnavailable

_VERSIONS = """
import importlib.metadata as metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def find_environment(
    peer: Peer, root: Path, chosen: Mapping[str, Path], progress: Callable[[str], None]
) -> Path:
    """The Python that has a peer, installing it if nothing here has.

    Looked at in this order: what the user chose, the environment that runs now, the peer's own one
    under ``root``, which is made if it is missing or holds another version.

    Args:
        chosen: peer's name -> an interpreter of the user's.
        progress: takes one line of text before anything that takes long.

    Raises:
        PeerUnavailable: if the chosen interpreter lacks the peer, or pip cannot install it.
    """
    if peer.name in chosen:
        missing = missing_packages(chosen[peer.name], peer.packages)
        if missing:
            raise PeerUnavailable(
                f"--python {peer.name}={chosen[peer.name]}: it has no {' and no '.join(missing)}; "
                "install that there, or leave the option out."
            )
        return chosen[peer.name]
    here = Path(sys.executable)
    if not missing_packages(here, peer.packages):
        return here
    own = root / peer.name
    python = own / "bin" / "python"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{peer.name}.lock"):
            if missing_packages(python, peer.packages):
                _install(peer, own, python, root / f"{peer.name}.log", progress)
    except OSError as error:
        raise PeerUnavailable(f"{own}: cannot make the environment: {error}.") from error
    return python


def missing_packages(python: Path, packages: tuple[Package, ...]) -> list[str]:
    """Requirements that an interpreter's environment does not fulfil; all, if there is none."""
    found = package_versions(python, [package.name for package in packages])
    return [each.requirement for each in packages if not _within(found.get(each.name), each)]


def package_versions(python: Path, names: list[str]) -> dict[str, str]:
    """Versions of those packages that an interpreter's environment has."""
    try:
        done = subprocess.run(
            [str(python), "-c", _VERSIONS, *names],
            capture_output=True, text=True, timeout=60, check=False, env=_clean_environment(),
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found: dict[str, str] = json.loads(done.stdout) if done.returncode == 0 else {}
    return found


def _within(version: str | None, package: Package) -> bool:
    return version is not None and _release(package.low) <= _release(version) < _release(
        package.below
    )


def _release(version: str) -> tuple[int, ...]:
    """The numbers of a version: 0.32.1rc2+cpu is (0, 32, 1)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _install(
    peer: Peer, own: Path, python: Path, log: Path, progress: Callable[[str], None]
) -> None:
    requirements = [package.requirement for package in peer.packages]
    progress(f"installing {' '.join(requirements)} into {own} (once; {peer.note})")
    if not python.exists():
        venv.create(own, with_pip=True)
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *requirements]
    environment = {**peer.build_environment, **_clean_environment()}
    with log.open("w") as out:
        done = subprocess.run(
            command, stdout=out, stderr=subprocess.STDOUT, check=False, env=environment
        )
    if done.returncode or missing_packages(python, peer.packages):
        raise PeerUnavailable(
            f"pip could not install {' '.join(requirements)}: {_reason(log)} The whole of it is in "
            f"{log}. {peer.hint}".rstrip()
        )
    for module in peer.removable:
        check = [str(python), "-c", f"import {module}"]
        if subprocess.run(check, capture_output=True, check=False, env=environment).returncode:
            remove = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", module]
            subprocess.run(remove, capture_output=True, check=False, env=environment)


def _reason(log: Path) -> str:
    """The last word of pip."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    word = (errors or lines or ["it said nothing"])[-1]
    return word if word.endswith((".", "!")) else word + "."


def _clean_environment() -> dict[str, str]:
    """This process's environment, without what would let another Python see our packages."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
