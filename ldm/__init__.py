"""Latent diffusion in pure PyTorch: networks, diffusion, samplers, guidance, conditioning, generation, interchange.

Knows nothing of clusters, stores, recipes or services; reads and writes local model folders only.
"""
