"""Diffusion processes, batches, class labels and pixel values."""
