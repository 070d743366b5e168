"""The algorithm: the block loop, statistics, methods, patterns, selection."""
