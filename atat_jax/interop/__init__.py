"""Weights of PyTorch networks, read from files without PyTorch."""

from atat_jax.interop.torch_weights import load_torch, read_state_dict

__all__ = ["load_torch", "read_state_dict"]
