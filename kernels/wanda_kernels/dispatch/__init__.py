"""Backend choice, argument checks, torch.library registration."""
