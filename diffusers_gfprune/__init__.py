"""Prune diffusion models by gradient flow, and save the pruned models in a form that `from_pretrained` loads.

Importing this package registers it with Diffusers: `DiffusionPipeline.from_pretrained` then loads pruned repositories with
the classes of this package and does not run code from the repository.
"""

from .configuration import GFPruneConfig
from .criteria import register_criterion
from .families.lookup import FAMILIES
from .loading.checks import PackageChecks
from .loading.registration import register
from .pipeline_pruning import prune_pipeline
from .pruner import GradientFlowPruner
from .remote.dit_transformer_2d_gfpruned import GFPrunedDiTTransformer2DModel
from .remote.pipeline_prune_ddpm import PruneDDPMPipeline
from .remote.pixart_transformer_2d_gfpruned import GFPrunedPixArtTransformer2DModel
from .remote.sd3_transformer_2d_gfpruned import GFPrunedSD3Transformer2DModel
from .remote.unet_2d_condition_gfpruned import GFPrunedUNet2DConditionModel
from .remote.unet_2d_gfpruned import GFPrunedUNet2DModel
from .version import __version__

__all__ = [
    "GFPruneConfig",
    "GFPrunedDiTTransformer2DModel",
    "GFPrunedPixArtTransformer2DModel",
    "GFPrunedSD3Transformer2DModel",
    "GFPrunedUNet2DConditionModel",
    "GFPrunedUNet2DModel",
    "GradientFlowPruner",
    "PruneDDPMPipeline",
    "__version__",
    "prune_pipeline",
    "register_criterion",
]

for _family in FAMILIES:  # before any model is loaded
    _family.pruned_class.checks = PackageChecks(_family)
register([family.pruned_class for family in FAMILIES], [PruneDDPMPipeline])
