"""What an operating point costs in quality: tasks, metrics and intervals, through the engine."""
