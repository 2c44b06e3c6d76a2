"""Encoders cut into stages, so that rows which are done can leave between two of them."""
