"""The package's version, in a file without imports so that the build reads it."""

__version__ = "0.1.0"
