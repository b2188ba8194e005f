"""Loading of pruned repositories: registration with Diffusers, and checks of configurations and weights."""
