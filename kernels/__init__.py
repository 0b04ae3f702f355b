"""Operations of the sparse paths: references in PyTorch, and Triton kernels beside them."""
