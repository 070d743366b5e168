"""A model's blocks, weights and gated MLPs; block inputs; faster forwards."""
