"""Several processes prune one model: who has which samples and rows, and how their results come together."""
