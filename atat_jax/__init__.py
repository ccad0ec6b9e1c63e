"""Adversarial robustness via attention transfer, in JAX."""
