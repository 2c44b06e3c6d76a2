"""Our own CPU kernels, and how they are compiled: what torch has none for."""
