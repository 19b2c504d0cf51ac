"""The library's version, as pyproject.toml states it (a test compares them)."""

VERSION = "0.1.0"
