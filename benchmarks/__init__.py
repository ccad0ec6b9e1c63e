"""Measurements against other implementations; not part of the package."""
