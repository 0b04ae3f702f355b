"""Looking into a trained network: ``python -m tiny_onn.inspect checkpoint=runs/x``."""
