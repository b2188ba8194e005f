"""What a run leaves to read: plots, provenance and the model card."""
