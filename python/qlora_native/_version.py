"""The version, in the one place that pyproject.toml, CMake and Python read."""

__version__ = "0.1.0"
