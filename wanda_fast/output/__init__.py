"""A run's folder: shards as blocks are done, resume, interrupts."""
