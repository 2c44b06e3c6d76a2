"""Paged KV pools with block tables, and attention over them: one file a backend."""
