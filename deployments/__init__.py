"""The Ray Serve application: one file a deployment class, ``app.py`` puts them together.

Serve reads its settings from the environment as it is imported, in every process; so they are set
here, before any file of this package imports it, and Ray's processes that are started from here
inherit them. The operator of a cluster sets them on every node (``fused.yaml``).
"""

import os

SERVE_ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.proxy.middlewares",
    # Calls between replicas go over gRPC (with Ray's token, and its TLS where that is on), which
    # takes less of the processor for a piece of a stream than Ray's generators do.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # Ray runs its workers at nice 15, beneath everything else on the machine; ours serve.
    "RAY_worker_niceness": "0",
}

for _name, _value in SERVE_ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
