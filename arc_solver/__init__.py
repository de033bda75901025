"""ARC-AGI solver: load tasks -> augment -> encode -> train -> adapt -> predict -> vote -> submission."""

__version__ = "0.1.0"
