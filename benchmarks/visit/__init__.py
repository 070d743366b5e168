"""The parts of a visit to a GPU: `benchmarks/gpu_visit.py` says in which order, and within what time."""
