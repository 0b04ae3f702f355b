"""Experts of a mixture, run from a boolean mask: see README.md."""
