"""Content-addressed KV blocks, shared by everything that runs the same model."""
