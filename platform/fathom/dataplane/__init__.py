"""Flushes on their way: an Arrow Flight exchange between a shallow and a deep replica."""
