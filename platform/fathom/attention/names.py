"""The names of attention backends, apart from torch: command lines read them."""

from __future__ import annotations

ATTENTIONS = ("auto", "kernel", "sdpa", "flex", "flashinfer")
"""``auto`` takes ``kernel`` on a CPU and ``flashinfer`` on a GPU where they run, else ``sdpa``."""
