"""A peer as a contender: its worker process, which sleeps while others are timed."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

import fathom
from fathom.bench.measure import Prompts, Run
from fathom.bench.peers import Peer, PeerUnavailable

_STOP_S = 10.0
_LOG_LINES = 3
_WORKER_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
}


class PeerContender:
    """A peer's worker process. See ``measure.Contender``.

    Args:
        python: of the environment that has the peer.
        settings: what the worker is told; see ``peer_protocol.serve``.
        scratch: an existing folder for its log, and for what makes this package importable there.

    Attributes:
        about: what the worker said of itself: ``versions`` and more.
        idle_cpu_s: CPU seconds that it has used between its runs, that is while others ran.

    Raises:
        PeerUnavailable: if it cannot be started, or cannot load the weights.
    """

    mode = "full"

    def __init__(self, peer: Peer, python: Path, settings: dict[str, Any], scratch: Path) -> None:
        self.engine = peer.name
        self.idle_cpu_s = 0.0
        self._log = scratch / f"{peer.name}.log"
        package = scratch / "package"
        package.mkdir(exist_ok=True)
        with suppress(FileExistsError):
            # This package alone, and not what stands beside it: the peer has versions of its own.
            (package / "fathom").symlink_to(Path(fathom.__file__).parent)
        threads = str(settings["threads"])
        environment = {
            **os.environ,
            **_WORKER_ENVIRONMENT,
            **peer.environment,
            "PYTHONPATH": str(package),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
        }
        command = [str(python), "-m", peer.module, json.dumps(settings)]
        with self._log.open("w") as log:
            try:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                    env=environment, cwd=scratch, text=True,
                )  # fmt: skip
            except OSError as error:
                raise PeerUnavailable(f"{python} cannot be started: {error}.") from error
        self.about: dict[str, Any] = self._take("ready")
        self._cpu_s = self._cpu_seconds()

    def run(self, prompts: Prompts, batch: int, new_tokens: int) -> Run:
        """See ``Contender.run``.

        Raises:
            PeerUnavailable: if the worker fails, or does not give every token asked for.
        """
        self.idle_cpu_s += self._cpu_seconds() - self._cpu_s
        assert self._process.stdin is not None
        asked = {"prompts": [list(p) for p in prompts], "batch": batch, "new_tokens": new_tokens}
        try:
            print(json.dumps(asked), file=self._process.stdin, flush=True)
        except OSError as error:
            raise PeerUnavailable(f"its worker has ended{self._last_words()}") from error
        run = Run(**self._take("run"))
        lengths = {len(ids) for ids in run.token_ids}
        if lengths != {new_tokens}:
            raise PeerUnavailable(
                f"it gave answers of {sorted(lengths)} tokens, {new_tokens} were asked for."
            )
        self._cpu_s = self._cpu_seconds()
        return run

    def close(self) -> None:
        """End the worker, and wait until it has gone."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what it did not read any more
                    pipe.close()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _take(self, kind: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_S)
            code = self._process.poll()
            raise PeerUnavailable(f"its worker ended with exit code {code}{self._last_words()}")
        message = json.loads(line)
        if "error" in message:
            raise PeerUnavailable(f"its worker failed: {message['error']}")
        found: dict[str, Any] = message[kind]
        return found

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()[-_LOG_LINES:]
        return ": " + " / ".join(line.strip() for line in lines) if lines else "."

    def _cpu_seconds(self) -> float:
        """CPU time of the worker and its children up to now."""
        total = 0.0
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            for each in (process, *process.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    times = each.cpu_times()
                    total += times.user + times.system
        return total


def start_peer(
    peer: Peer,
    python: Path,
    settings: dict[str, Any],
    scratch: Path,
    *,
    try_out: Callable[[PeerContender], None],
) -> PeerContender:
    """Start a worker and try it out; it is ended again if it cannot do what is asked.

    Raises:
        PeerUnavailable: why it cannot take part.
    """
    contender = PeerContender(peer, python, settings, scratch)
    started = time.perf_counter()
    try:
        try_out(contender)
    except BaseException:
        contender.close()
        raise
    contender.about["first_runs_s"] = round(time.perf_counter() - started, 3)
    return contender
