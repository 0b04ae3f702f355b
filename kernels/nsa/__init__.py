"""Native Sparse Attention (Yuan et al., arXiv 2502.11089): see README.md beside this file."""
