"""Adversarial robustness via attention transfer, in JAX."""

__version__ = "0.1.0"
