"""A deep replica as a process of its own: prints its address, and serves until it is killed.

python -m tests.integration.dataplane.deep_process MODEL_DIR NUM_BLOCKS
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import torch

from fathom.models.load import load_decoder
from tests.unit.dataplane.conftest import Deep
from tests.unit.engine.conftest import make_engine_of


def main() -> None:
    """Serve."""
    torch.set_num_threads(1)
    directory, num_blocks = Path(sys.argv[1]), int(sys.argv[2])
    decoder = load_decoder(directory, dtype=torch.float32)
    deep = Deep(make_engine_of(decoder, directory, num_blocks)._deep)
    print(deep.server.address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
