"""Checks with which the installed package loads pruned models from untrusted repositories.

`LoadingChecks`, in the file of the pruned class, defines when each check is called. `diffusers_gfprune` replaces it by these
checks on import.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..families.base import Family
from ..remote.pruned_model import LoadingChecks
from .config_checks import check_config_file, check_removed_blocks, check_tables
from .weight_checks import check_weights

__all__ = ["PackageChecks"]


class PackageChecks(LoadingChecks):
    """Checks of config.json and of the weight files.

    Args:
        family: Family of the models.
    """

    def __init__(self, family: Family) -> None:
        self.family = family

    config_file = staticmethod(check_config_file)
    weights = staticmethod(check_weights)

    def arguments(self, dense: Mapping) -> None:
        self.family.check_arguments(dense)

    def blocks(self, skeleton: nn.Module, removed_blocks: object) -> None:
        check_removed_blocks(self.family, skeleton, removed_blocks)

    def tables(self, skeleton: nn.Module, tables: Mapping[str, Mapping]) -> None:
        check_tables(self.family, skeleton, tables)
