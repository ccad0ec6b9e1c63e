"""Weights of PyTorch networks, read and written without PyTorch."""

from atat_jax.interop.loaded import Loaded
from atat_jax.interop.loading import load
from atat_jax.interop.sanity_check import Sanity, sanity
from atat_jax.interop.saving import Saved, save
from atat_jax.interop.torch_weights import load_torch, read_state_dict

__all__ = [
  "Loaded",
  "Sanity",
  "Saved",
  "load",
  "load_torch",
  "read_state_dict",
  "sanity",
  "save",
]
