"""The scripts, installed as `diffusers_gfprune.scripts`: `accelerate launch -m diffusers_gfprune.scripts.prune_ddpm`."""
