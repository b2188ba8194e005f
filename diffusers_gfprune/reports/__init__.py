"""Reports of a run: results, plots, provenance and the model card."""
