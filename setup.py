"""Packages of a wheel, which a table cannot list; the rest is in pyproject.toml.

The configurations are in `configs/` in the repository, where they are read and
copied, and in `atat_jax/configs` in an installation.
"""

import setuptools

setuptools.setup(
  packages=[
    *setuptools.find_namespace_packages(
      include=["atat_jax", "atat_jax.*"], exclude=["*.__pycache__"]
    ),
    "atat_jax.configs",
  ],
  package_dir={"atat_jax.configs": "configs"},
)
