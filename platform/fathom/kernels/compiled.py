"""Compiling this room's C++ for the machine that it runs on, once, into the cache."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch  # noqa: F401  (its OpenMP runtime must be there before the library is)

from fathom.models.cache import build_directory, cache_root
from fathom.models.errors import ModelError

_FOLDER = Path(__file__).parent
_UNITS = ("attention", "layers", "linear", "prefill", "rows")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp", "-Wno-psabi")
_COMPILERS = ("c++", "g++", "clang++")
_LIBRARY = "kernels.so"

_log = logging.getLogger(__name__)


class Weight(ctypes.Structure):
    """``struct Weight`` of kernels.h."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("bits", ctypes.c_int32),
    )


class Pass(ctypes.Structure):
    """``struct Pass`` of kernels.h."""

    _fields_ = (
        ("tables", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("sequences", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("spans", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("span_count", ctypes.c_int64),
        ("written", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("block_size", ctypes.c_int32),
        ("kv_heads", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("is_bfloat16", ctypes.c_int32),
    )


class Layer(ctypes.Structure):
    """``struct Layer`` of kernels.h."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in ("input_norm", "qkv", "qk_norm", "output", "post_norm", "gate_up", "down")
    )


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels; the first call on a machine takes seconds.

    Raises:
        ModelError: without a C++ compiler, or if it fails.
    """
    compiler = _compiler()
    sources = sorted([*_FOLDER.glob("*.cpp"), *_FOLDER.glob("*.h")])
    parts = [*(path.read_bytes() for path in sources), _version(compiler), _cpu()]
    digest = hashlib.sha256(b"\0".join([*parts, " ".join(_FLAGS).encode()])).hexdigest()
    folder = cache_root() / "kernels" / digest[:16]
    found = build_directory(folder, lambda path: _compile(compiler, path)) / _LIBRARY
    try:
        loaded = ctypes.CDLL(str(found))
    except OSError as error:
        raise ModelError(
            f"{found}: cannot load: {error}. Delete its folder, and it is built anew."
        ) from error
    _declare(loaded)
    return loaded


@cache
def optional_library() -> ctypes.CDLL | None:
    """``library``, or None where it cannot be had, or ``FATHOM_KERNELS=off`` says so."""
    if os.environ.get("FATHOM_KERNELS") == "off":
        return None
    try:
        return library()
    except ModelError as error:
        _log.warning("slower without compiled kernels: %s", error)
        return None


def _declare(loaded: ctypes.CDLL) -> None:
    pointer, integer, size, real = (
        ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float,
    )  # fmt: skip
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "fathom_has_vnni": (integer, []),
        "fathom_has_bfloat16": (integer, []),
        "fathom_attends": (integer, [integer]),
        "fathom_linear": (
            None,
            [
                *(pointer, pointer, integer, size, size),  # weight; x, is_bfloat16, rows, stride
                *(pointer, real, integer),  # norm, eps, epilogue
                *(pointer, size, pointer, size, integer),  # residual, out, threads
            ],
        ),
        "fathom_attend": (
            None,
            [
                *(pointer, pointer, size),  # pass; pool, slots
                *(pointer, size, pointer, size, real),  # q, kv, scale
                *(pointer, size, integer),  # out, threads
            ],
        ),
        "fathom_layers": (
            None,
            [
                *(pointer, size, pointer),  # layers, count, pass
                *(pointer, size, size, pointer),  # pool, layer_bytes, slots, hidden
                *(real, real, pointer, pointer, integer),  # eps, scale, cos, sin, threads
            ],
        ),
        "fathom_rotate": (None, [pointer, integer, size, size, size, size, pointer, pointer]),
        "fathom_rms_norm": (None, [pointer, integer, size, size, size, pointer, real, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments


def _compiler() -> str:
    own = os.environ.get("CXX", "")
    for name in (own, *_COMPILERS):
        if name and (path := shutil.which(name)):
            return path
    raise ModelError(
        "CPU kernels are compiled for the machine, and no C++ compiler was found "
        f"({', '.join(_COMPILERS)}, or $CXX): install one (Debian: apt-get install g++)."
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
    objects = [str(folder / f"{unit}.o") for unit in _UNITS]
    compile_each = [
        [compiler, *_FLAGS, "-c", str(_FOLDER / f"{unit}.cpp"), "-o", out]
        for unit, out in zip(_UNITS, objects, strict=True)
    ]
    link = [compiler, "-shared", *objects, "-o", str(folder / _LIBRARY)]
    for command in (*compile_each, link):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ModelError(f"{' '.join(command)} failed:\n{done.stderr.strip()[-2000:]}")
    for path in objects:
        Path(path).unlink()
