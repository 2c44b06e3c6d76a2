"""Which replica gets a request: sessions, prefixes, load. Plain Python, no Ray."""
