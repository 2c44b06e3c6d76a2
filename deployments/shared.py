"""What the replicas of an application share, beyond the life of any of them.

The data plane's token, and the authority that signs its certificates, lie in the key-value table
of Ray's control store. The first replica that asks makes them. So they are the same for all
replicas, stay the same over a rolling update and over the death of any process, and are in no
configuration, argument or log. Who can read that table can run code on the cluster anyway; Ray's
own token keeps others out.
"""

from __future__ import annotations

import contextlib
import json
import secrets
from dataclasses import dataclass, field

import ray
from ray import serve
from ray.experimental import internal_kv

from deployments.certificates import Authority, issue, make_authority
from deployments.journal import stop_journal
from deployments.policies import stop_policies
from deployments.shadow import stop_shadow
from fathom.config import ConfigError, DataPlaneConfig, ServeConfig
from fathom.dataplane.tls import Tls
from fathom.kvstore.ray_store import NAMESPACE, RayKVStore, start_store, stop_store, store_name

_TABLE = b"fathom"


@dataclass(frozen=True, slots=True)
class Credentials:
    """Of one application's data plane; the text form of this object shows none of it."""

    token: str = field(repr=False)
    authority: Authority = field(repr=False)


def credentials_of(application: str) -> Credentials:
    """The application's credentials, made if there are none yet. Needs a connection to Ray."""
    key = _key(application)
    if not internal_kv._internal_kv_exists(key, namespace=_TABLE):
        authority = make_authority()
        made = {
            "token": secrets.token_urlsafe(32),
            "certificate": authority.certificate.decode(),
            "key": authority.key.decode(),
        }
        # Whoever comes first wins; all others read what that one has put.
        value = json.dumps(made).encode()
        internal_kv._internal_kv_put(key, value, overwrite=False, namespace=_TABLE)
    found = json.loads(internal_kv._internal_kv_get(key, namespace=_TABLE))
    authority = Authority(found["certificate"].encode(), found["key"].encode())
    return Credentials(found["token"], authority)


def server_tls(config: DataPlaneConfig, credentials: Credentials, host: str) -> Tls | None:
    """Certificate and key for a deep replica that listens on ``host``; None without TLS.

    Raises:
        ConfigError: for a PEM file that cannot be read.
    """
    if not config.tls:
        return None
    if config.tls_certificate:
        return Tls(_read(config.tls_certificate), _read(config.tls_key))
    return Tls(*issue(credentials.authority, host))


def client_tls(config: DataPlaneConfig, credentials: Credentials) -> Tls | None:
    """The authority's certificate, which a shallow replica trusts; None without TLS.

    Raises:
        ConfigError: for a PEM file that cannot be read.
    """
    if not config.tls:
        return None
    if config.tls_authority:
        return Tls(_read(config.tls_authority))
    return Tls(credentials.authority.certificate)


def open_store(config: ServeConfig, application: str) -> RayKVStore | None:
    """The KV store that the application's replicas share, started if there is none; or None."""
    if not config.store_shards:
        return None
    return RayKVStore(
        start_store(
            store_name(application),
            shards=config.store_shards,
            budget_bytes=config.kv_store.budget_bytes,
        )
    )


def end(application: str) -> None:
    """End what the application's replicas shared.

    KV store, journal of streams, what exit policies have seen, the shadow, credentials.
    """
    stop_journal(application)
    stop_policies(application)
    stop_shadow(application)
    prefix = f"{store_name(application)}-"
    actors = ray.util.list_named_actors(all_namespaces=True)
    names = [each["name"] for each in actors if each["namespace"] == NAMESPACE]
    numbers = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    shards = 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)
    stop_store(store_name(application), shards=shards)
    internal_kv._internal_kv_del(_key(application), namespace=_TABLE)


def end_if_deleted(application: str) -> None:
    """``end``, if Serve is deleting the application: it may have no other witness of that.

    For replicas that stop. An update, or fewer replicas, leave what is shared as it is.
    """
    with contextlib.suppress(Exception):  # Serve, or Ray, may be going as well
        status = serve.status().applications.get(application)
        if status is None or status.status == "DELETING":
            end(application)


def _key(application: str) -> bytes:
    return f"data plane of {application}".encode()


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ConfigError(
            f"data_plane: cannot read {path}: {error.strerror}; the file must be on every node."
        ) from error
