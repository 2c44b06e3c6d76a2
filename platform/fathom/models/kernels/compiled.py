"""Compiling this room's C++ for the machine that it runs on, once, into the cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch  # noqa: F401  (its OpenMP runtime must be there before the library is)

from fathom.models.cache import build_directory, cache_root
from fathom.models.errors import ModelError

_SOURCE = Path(__file__).with_name("low_bit.cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp")
_COMPILERS = ("c++", "g++", "clang++")
_LIBRARY = "low_bit.so"


class Weight(ctypes.Structure):
    """``struct Weight`` of low_bit.cpp."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("bits", ctypes.c_int32),
    )


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels; the first call on a machine takes seconds.

    Raises:
        ModelError: without a C++ compiler, or if it fails.
    """
    compiler = _compiler()
    text = _SOURCE.read_bytes() + _version(compiler) + " ".join(_FLAGS).encode() + _cpu()
    folder = cache_root() / "kernels" / hashlib.sha256(text).hexdigest()[:16]
    found = build_directory(folder, lambda path: _compile(compiler, path)) / _LIBRARY
    try:
        loaded = ctypes.CDLL(str(found))
    except OSError as error:
        raise ModelError(
            f"{found}: cannot load: {error}. Delete its folder to build anew."
        ) from error
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    loaded.fathom_linear.restype = None
    loaded.fathom_linear.argtypes = [
        *(pointer, pointer, integer, size, size),  # weight; x, is_bfloat16, rows, x_stride
        *(pointer, ctypes.c_float, integer),  # norm, eps, epilogue
        *(pointer, size, pointer, size, integer),  # residual, stride, out, stride, threads
    ]
    loaded.fathom_has_vnni.restype = integer
    return loaded


def _compiler() -> str:
    own = os.environ.get("CXX", "")
    for name in (own, *_COMPILERS):
        if name and (path := shutil.which(name)):
            return path
    raise ModelError(
        "quantization on a CPU compiles its kernels for the machine, and no C++ compiler was "
        f"found ({', '.join(_COMPILERS)}, or $CXX): install one (Debian: apt-get install g++)."
    )


def _version(compiler: str) -> bytes:
    return subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout


def _cpu() -> bytes:
    """What ``-march=native`` depends on: a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return b""
    wanted = (b"model name", b"flags", b"Features", b"CPU part")
    return b"\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compile(compiler: str, folder: Path) -> None:
    # Linked without -fopenmp: the runtime that torch brings is used, not a second one beside it,
    # whose threads would fight with torch's over the cores.
    unit = folder / "low_bit.o"
    for command in (
        [compiler, *_FLAGS, "-c", str(_SOURCE), "-o", str(unit)],
        [compiler, "-shared", str(unit), "-o", str(folder / _LIBRARY)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ModelError(
                f"quantization: {' '.join(command)} failed:\n{done.stderr.strip()[-2000:]}"
            )
    unit.unlink()
