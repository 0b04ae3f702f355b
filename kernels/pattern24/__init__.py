"""Weights under 2:4 patterns drawn by Gumbel noise that is never stored: see README.md."""
