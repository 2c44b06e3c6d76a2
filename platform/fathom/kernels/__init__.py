"""Our own CPU kernels in C++, compiled for the machine: what torch has none for."""
