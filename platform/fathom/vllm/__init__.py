"""vLLM beside Fathom: its engine behind our gateway, and our KV store behind its engine."""
