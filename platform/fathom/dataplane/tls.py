"""What an exchange is encrypted with; imports nothing, for those who only make it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM texts: a certificate with its key for a server, the authority's alone for a client."""

    certificate: bytes
    key: bytes = b""
