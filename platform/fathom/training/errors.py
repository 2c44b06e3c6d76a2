"""The one error of this room."""


class TrainingError(RuntimeError):
    """Something the user can put right: missing data, a model of another shape, a stale folder."""
