"""The version of this package, below every other module."""

__version__ = "0.1.0"
