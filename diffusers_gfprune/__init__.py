"""Prune DDPMs by gradient flow, and save what is left so that `from_pretrained` loads it.

Importing this package registers it with Diffusers: `DiffusionPipeline.from_pretrained` then loads pruned repositories with
the classes here, and runs no code from them.
"""

from types import ModuleType as _ModuleType

from diffusers import pipelines as _pipelines
from diffusers.models.modeling_utils import ModelMixin as _ModelMixin

from .configuration import GFPruneConfig
from .importance import register_criterion
from .pruner import GradientFlowPruner
from .remote.pipeline_prune_ddpm import PruneDDPMPipeline
from .remote.unet_2d_gfpruned import GFPrunedUNet2DModel
from .version import __version__

__all__ = [
    "GFPruneConfig",
    "GFPrunedUNet2DModel",
    "GradientFlowPruner",
    "PruneDDPMPipeline",
    "__version__",
    "register_criterion",
]


class _NotThere(AttributeError, ValueError):
    """A class that a repository cannot name."""


class _Registered(_ModuleType):
    """What a repository may name in model_index.json, and nothing else of this package."""

    def __getattr__(self, name: str):
        raise _NotThere(f"{name} is no class of diffusers_gfprune that a repository can name: it has GFPrunedUNet2DModel")


# Diffusers resolves the library names in model_index.json among its own pipeline modules and a fixed list; it imports
# nothing that a repository merely names. Undocumented, so a test guards it.
_pipelines.diffusers_gfprune = _Registered(__name__)
for _class in (GFPrunedUNet2DModel, PruneDDPMPipeline, _ModelMixin):  # the last one Diffusers looks up itself
    setattr(_pipelines.diffusers_gfprune, _class.__name__, _class)
