"""Triton kernels of the sparse paths (none yet: the dense baseline needs none)."""
