"""When a token may stop: confidence measures and exit policies."""
