"""Diffusion processes, class labels and pixel values: what a model is trained to undo, and on what."""
