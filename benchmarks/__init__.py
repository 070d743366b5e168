"""Measurements: each operation and the whole job against the PyTorch reference."""
