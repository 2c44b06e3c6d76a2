"""Fathom: serving language models at adaptive depth."""

__version__ = "0.1.0"
