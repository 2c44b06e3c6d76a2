"""Settings of a cluster: pools of replicas, the data plane between them, the shared KV store."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from fathom.settings import ConfigError, check_above_zero, check_at_least


class Topology(StrEnum):
    """Where the two stages of the model run."""

    FUSED = "fused"
    """Both in every replica."""

    DISAGGREGATED = "disaggregated"
    """In replicas of their own, each with its layers' weights alone."""

    VLLM = "vllm"
    """In vLLM, which runs all layers at every token: what the others are compared with."""


class Placement(StrEnum):
    """Where deep replicas are placed."""

    SPREAD = "spread"
    """A deployment of their own, wherever the cluster has room."""

    BESIDE = "beside"
    """One beside every shallow replica, in one placement group on one node: flushes stay there
    while it lives. There are as many of them as shallow replicas, and they scale together."""


class Router(StrEnum):
    """How a request gets to a replica."""

    PREFIX = "prefix"
    """To its session's, else to the one that served its prefix, else to the least loaded."""

    POW2 = "pow2"
    """To the less loaded of two chosen at random, which is Ray Serve's own way."""


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """Replicas of one kind.

    Attributes:
        num_replicas: at the start, and for good unless ``max_replicas`` is set.
        cpus: CPU cores of a replica, which is also its thread count.
        max_replicas: 0 keeps the pool as it is; more lets it follow its load, up to this many.
        min_replicas: fewest that are left when there is little to do.
        target: load of a replica that is aimed at. Shallow: requests, running and waiting. Deep:
            seconds that a flush waits before its pass.
        upscale_delay_s, downscale_delay_s: how long a pool must be too small, or too large, before
            it changes.
        look_back_s: seconds over which load is averaged.
    """

    num_replicas: int = 1
    cpus: float = 1.0
    max_replicas: int = 0
    min_replicas: int = 1
    target: float = 16.0
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 120.0
    look_back_s: float = 20.0

    @property
    def most(self) -> int:
        """Replicas that there can be."""
        return max(self.num_replicas, self.max_replicas)

    @property
    def fewest(self) -> int:
        """Replicas that there always are."""
        return self.min_replicas if self.max_replicas else self.num_replicas

    def validate(self, where: str) -> None:
        """Check every field.

        Args:
            where: this pool's name with a dot, for messages.

        Raises:
            ConfigError: naming the first field out of range, its value and the remedy.
        """
        check_above_zero(self, ("num_replicas", "cpus", "min_replicas", "target"), where)
        check_above_zero(self, ("look_back_s",), where)
        check_at_least(self, ("max_replicas", "upscale_delay_s", "downscale_delay_s"), 0, where)
        if self.max_replicas and not self.min_replicas <= self.num_replicas <= self.max_replicas:
            raise ConfigError(
                f"{where}num_replicas must be from {where}min_replicas ({self.min_replicas}) to "
                f"{where}max_replicas ({self.max_replicas}), got {self.num_replicas}."
            )


@dataclass(frozen=True, kw_only=True)
class DeepConfig(PoolConfig):
    """Deep replicas.

    Attributes:
        leases: shallow replicas that one deep replica can hold KV blocks for at once, each a deep
            half of ``engine.kv_cache_bytes``. 0 takes as many as let one deep replica fail, or be
            replaced, without a shallow one being turned away.
    """

    target: float = 0.05
    leases: int = 0

    def validate(self, where: str) -> None:
        """See ``PoolConfig.validate``."""
        super().validate(where)
        check_at_least(self, ("leases",), 0, where)


@dataclass(frozen=True, kw_only=True)
class KVStoreConfig:
    """The store of KV blocks that all replicas share, in Ray's object store.

    Attributes:
        shards: actors that list and own the blocks. 0: no shared store; -1: two, where there is
            more than one replica to share with.
        budget_bytes: of all blocks together; the least recently used go first. Ray spills what
            its memory does not hold.
    """

    shards: int = -1
    budget_bytes: int = 1 << 30

    def validate(self, where: str) -> None:
        """Check every field.

        Raises:
            ConfigError: naming the first field out of range, its value and the remedy.
        """
        check_at_least(self, ("shards",), -1, where)
        check_above_zero(self, ("budget_bytes",), where)


@dataclass(frozen=True, kw_only=True)
class DataPlaneConfig:
    """The connections on which flushes travel between shallow and deep replicas.

    They are always authenticated, by a token that the application makes when it first starts.

    Attributes:
        host: what deep replicas listen on; empty takes the address that their node has in Ray.
        tls: encrypt. Without files below, the application makes an authority of its own when it
            first starts, and each deep replica a certificate of it for its address.
        tls_certificate, tls_key, tls_authority: an operator's own PEM files, on every node under
            the same path. The certificate must name every address that deep replicas listen on.
        deadline_s: longest that a flush may take before its deep replica counts as lost.
        give_up_s: longest that a shallow replica looks for another deep one before its requests
            fail; a deep replica that starts anew has to load its weights in this time.
        refresh_s: how often shallow replicas ask which deep ones there are.
    """

    host: str = ""
    tls: bool = False
    tls_certificate: str = ""
    tls_key: str = ""
    tls_authority: str = ""
    deadline_s: float = 30.0
    give_up_s: float = 90.0
    refresh_s: float = 1.0

    def validate(self, where: str) -> None:
        """Check every field.

        Raises:
            ConfigError: naming the first field out of range, its value and the remedy.
        """
        check_above_zero(self, ("deadline_s", "give_up_s", "refresh_s"), where)
        files = (self.tls_certificate, self.tls_key, self.tls_authority)
        if any(files) and not all(files):
            raise ConfigError(
                f"{where}tls_certificate, tls_key and tls_authority belong together: set all of "
                "them, or none for certificates that the application makes."
            )
        if any(files) and not self.tls:
            raise ConfigError(f"{where}tls must be true where {where}tls_certificate is set.")


def leases_of(deep: DeepConfig, shallow: PoolConfig, placement: Placement, surge: int) -> int:
    """Shallow replicas that each deep replica can hold blocks for.

    Args:
        surge: shallow replicas that there can be beyond ``shallow.most`` during an update.
    """
    if deep.leases:
        return deep.leases
    peers = shallow.fewest if placement is Placement.BESIDE else deep.fewest
    return math.ceil((shallow.most + surge) / max(1, peers - 1))
