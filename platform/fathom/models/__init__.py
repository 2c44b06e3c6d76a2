"""What runs: decoders over ragged rows, their weights, rotary embeddings and tokenizers."""
