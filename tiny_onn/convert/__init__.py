"""``python -m tiny_onn.convert``: a trained checkpoint of 2:4 weights in packed form, and back."""
