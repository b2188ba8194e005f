"""Files that are copied unchanged into saved models: they import only the standard library, torch and Diffusers."""
