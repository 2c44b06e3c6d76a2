"""Training of what adaptive depth adds to a model: exit heads first."""
