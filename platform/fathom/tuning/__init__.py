"""What tuning works on: traces of the engine's drafts."""
