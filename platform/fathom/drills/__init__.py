"""Drills: load with broken connections and killed processes, and the account of what was lost."""
