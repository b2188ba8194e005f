"""Loading of pruned models: registration with Diffusers, and checks of configurations and weights."""
