"""The checks by which an installed package loads pruned models of repositories that nobody has to trust.

`remote.unet_2d_gfpruned.LoadingChecks` says when each is called; `diffusers_gfprune` puts these in its place on import.
"""

from __future__ import annotations

from ..remote.unet_2d_gfpruned import LoadingChecks
from .config_checks import check_arguments, check_config_file, check_tables
from .weight_checks import check_weights

__all__ = ["PackageChecks"]


class PackageChecks(LoadingChecks):
    """Everything in config.json and in the files of weights, by the functions of those names."""

    config_file = staticmethod(check_config_file)
    arguments = staticmethod(check_arguments)
    tables = staticmethod(check_tables)
    weights = staticmethod(check_weights)
