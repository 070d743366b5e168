"""Packed checkpoints: the format, files read and written, whole folders packed and unpacked."""
