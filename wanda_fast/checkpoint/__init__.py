"""Checkpoints in and out: shards, meta-device models, atomic writes."""
