"""Where models are kept on this machine, and how what is made of them gets there whole."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from fathom.models.errors import ModelError


def cache_root() -> Path:
    """``$FATHOM_CACHE``, or ``~/.cache/fathom``."""
    configured = os.environ.get("FATHOM_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "fathom"


def model_directory(name: str) -> Path:
    """The cache's directory for a model of this name; ``/`` becomes ``--`` as on the hub."""
    return cache_root() / "models" / name.replace("/", "--")


def content_key(files: Iterable[Path], *more: str) -> str:
    """SHA-256, in hexadecimal, over names and contents of files, and over what else matters.

    Raises:
        OSError: for a file that cannot be read.
    """
    digest = hashlib.sha256()
    for part in (*more, *(part for file in files for part in (file.name, file.read_bytes()))):
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def remembered(room: str, key: str, make: Callable[[], str]) -> str:
    """A text that takes long to make, kept in the cache under a key that says what it is of.

    A cache that cannot be written only costs the next call its time. Errors of ``make`` pass
    through, and nothing is kept then.
    """
    note = cache_root() / room / key
    with suppress(OSError):
        if kept := note.read_text(encoding="utf-8"):  # a crash may leave an empty file
            return kept
    text = make()
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        partial = note.with_name(f".{key}.{os.getpid()}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.rename(note)
    return text


def build_directory(final: Path, build: Callable[[Path], None]) -> Path:
    """Make a directory once, whole or not at all.

    Processes that ask for the same directory at the same time wait for the first one. What an
    interrupted one has left is cleared away by the next.

    Args:
        final: the directory to make; returned at once if it exists.
        build: fills the empty directory that it is given.

    Raises:
        ModelError: if the cache cannot be written. Errors of ``build`` pass through.
    """
    if final.is_dir():
        return final
    partial = final.with_name(f"{final.name}.partial")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.with_name(f".{final.name}.lock")):
            if final.is_dir():
                return final
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                build(partial)
                partial.rename(final)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise ModelError(
            f"{final}: cannot write the model cache: {error}. Set FATHOM_CACHE to a directory "
            "with free space that this user may write."
        ) from error
    return final
