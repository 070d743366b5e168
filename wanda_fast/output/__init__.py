"""A run's folder: its lock, shards as blocks are done, resume, interrupts."""
