"""Pruned models at work: packed linears and their loading, 2:4 on GPUs, timings before pruning."""
