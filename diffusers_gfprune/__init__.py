"""Prune DDPMs by gradient flow, and save what is left so that `from_pretrained` loads it.

Importing this package registers it with Diffusers: `DiffusionPipeline.from_pretrained` then loads pruned repositories with
the classes here, and runs no code from them.
"""

from diffusers import pipelines as _pipelines
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  Diffusers looks it up in a pipeline module

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

# Diffusers resolves the library names in model_index.json among its own pipeline modules and a fixed list; it imports
# nothing that a repository merely names. Undocumented, so a test guards it.
import sys as _sys

_pipelines.diffusers_gfprune = _sys.modules[__name__]
