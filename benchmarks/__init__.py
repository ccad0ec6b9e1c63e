"""Measurements of the package, alone and beside other implementations."""
