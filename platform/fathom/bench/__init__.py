"""Measuring the engine: modes and peers in turn, beside the speed-up that is possible."""
