"""The one error of this room, in a module that costs nothing to import."""


class ModelError(ValueError):
    """A model that cannot be found, read or run; the message names the file and the remedy."""
