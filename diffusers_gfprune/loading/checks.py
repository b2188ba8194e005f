"""The checks by which an installed package loads pruned models of repositories that nobody has to trust.

`LoadingChecks`, in the file of the pruned class, says when each is called; `diffusers_gfprune` puts these in its place on
import.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..families.base import Family
from ..remote.unet_2d_gfpruned import LoadingChecks
from .config_checks import check_config_file, check_tables
from .weight_checks import check_weights

__all__ = ["PackageChecks"]


class PackageChecks(LoadingChecks):
    """Everything in config.json and in the files of weights.

    Args:
        family: Of the models.
    """

    def __init__(self, family: Family) -> None:
        self.family = family

    config_file = staticmethod(check_config_file)
    weights = staticmethod(check_weights)

    def arguments(self, dense: Mapping) -> None:
        self.family.check_arguments(dense)

    def tables(self, skeleton: nn.Module, tables: Mapping[str, Mapping]) -> None:
        check_tables(self.family, skeleton, tables)
