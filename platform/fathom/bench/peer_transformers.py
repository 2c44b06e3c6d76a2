"""The worker of transformers: greedy ``generate`` on the Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fathom.bench.peer_protocol import Runner, serve


def load(settings: dict[str, Any]) -> tuple[Runner, dict[str, Any]]:
    """See ``peer_protocol.serve``."""
    import torch
    import transformers

    from fathom.bench.transformers_peer import TransformersContender

    torch.set_num_threads(settings["threads"])
    runner = TransformersContender(
        Path(settings["weights"]), settings["dtype"], settings["pad_token_id"], settings["device"]
    )
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return runner, {"versions": versions}


if __name__ == "__main__":
    serve(load)
