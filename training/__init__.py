"""The scripts, installed as `diffusers_gfprune.scripts`: `accelerate launch -m diffusers_gfprune.scripts.prune_ddpm`."""

from diffusers_gfprune.errors import one_line_errors
from diffusers_gfprune.extras import check_extra

with one_line_errors("diffusers_gfprune.scripts"):
    check_extra()
