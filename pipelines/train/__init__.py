"""Training: the order of samples and their randomness, loaders, one step, the loop, and what launches it."""
