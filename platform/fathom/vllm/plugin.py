"""What vLLM calls as it starts, in each of its processes (entry point ``vllm.general_plugins``)."""

from __future__ import annotations

CONNECTOR = "FathomConnector"
"""Name of the connector in ``--kv-transfer-config``."""


def register() -> None:
    """Make the connector known to vLLM by its name. Loads nothing of it; may be called again."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "fathom.vllm.kv_connector", CONNECTOR)
