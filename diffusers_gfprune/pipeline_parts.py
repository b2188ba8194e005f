"""The parts of a pipeline that measuring its denoiser needs: the denoiser, its scheduler, VAE and text encoders."""

from __future__ import annotations

import copy
import logging
from typing import NamedTuple

from diffusers import DiffusionPipeline, ModelMixin, VQModel
from torch import nn

from .diffusion.latents import LatentCodec
from .diffusion.prompts import PromptEncoder
from .diffusion.schedulers import training_process, training_scheduler
from .families.base import Family
from .families.lookup import FAMILIES
from .loading.pipeline_layouts import LAYOUTS, check_process
from .metrics.model_size import spatial_size
from .pruning.dependencies import check_unhooked

__all__ = ["PipelineParts"]

logger = logging.getLogger(__name__)


class PipelineParts(NamedTuple):
    """Parts of a supported pipeline.

    Attributes:
        family: Family of the denoiser.
        denoiser: The denoiser, dense or pruned; not a copy.
        scheduler: The scheduler of the pipeline, in latents as the model was trained (`training_scheduler`).
        codec: Encodes images to latents and decodes samples; None for pixels.
        prompts: Encodes prompts; None unless text is the condition.
        pipeline: Name of the pipeline's class.
    """

    family: Family
    denoiser: ModelMixin
    scheduler: object
    codec: LatentCodec | None = None
    prompts: PromptEncoder | None = None
    pipeline: str = "DDPMPipeline"

    @classmethod
    def of(cls, pipe: DiffusionPipeline, pruned: bool = False) -> PipelineParts:
        """The parts of a pipeline in memory. VAE and text encoders are copied, since they encode in float32.

        Args:
            pipe: A pipeline of one of the classes in `LAYOUTS`.
            pruned: Whether a pruned denoiser is accepted.

        Raises:
            ValueError: The pipeline is not supported, its denoiser is pruned, or a component has hooks.
        """
        family, denoiser = _denoiser(pipe, pruned)
        layout, codec, prompts = LAYOUTS[type(pipe).__name__], None, None
        scheduler = pipe.scheduler if layout.autoencoder is None else training_scheduler(pipe.scheduler)
        for name in (family.component, *layout.loaded):
            if isinstance(pipe.components[name], nn.Module):
                check_unhooked(pipe.components[name], f"the {name} of the pipeline")
        components = {name: copy.deepcopy(pipe.components[name]) for name in layout.loaded}
        if layout.autoencoder is not None:
            vae = components[layout.autoencoder]
            if isinstance(vae, VQModel) and _has_filled_in_scale(vae):
                logger.warning(
                    "%s had no scaling_factor in its config.json, and Diffusers took %g. Models from before Diffusers 0.22 "
                    "have 1: pipe.%s.register_to_config(scaling_factor=1.0)",
                    *(layout.autoencoder, vae.config.scaling_factor, layout.autoencoder),
                )
            codec = LatentCodec(vae)
        if layout.text:
            image_size = codec.image_shape(*spatial_size(denoiser))[1:]
            zeros = pipe.config.get("force_zeros_for_empty_prompt", True)
            takes = family.example_inputs(denoiser, *family.tracing_size(denoiser.config)).conditioning
            prompts = PromptEncoder.of_pipeline(components, image_size, zeros, layout.max_length, takes)
        return cls(family, denoiser, scheduler, codec, prompts, type(pipe).__name__)

    def check_process(self) -> None:
        """Check that the pipeline samples the process of its scheduler, and that the denoiser can embed its timesteps and gets
        all that it takes.

        Raises:
            ValueError: The scheduler is not supported, or not in this pipeline, or the pipeline is one of other models.
        """
        process = training_process(self.scheduler)
        check_process(self.pipeline, process)
        self.family.check_process(self.denoiser.config, process)
        self.family.check_pipeline(self.denoiser.config, self.pipeline)


def _denoiser(pipe: DiffusionPipeline, pruned: bool) -> tuple[Family, ModelMixin]:
    """Family and denoiser of a pipeline."""
    name = type(pipe).__name__
    if not isinstance(pipe, DiffusionPipeline):
        raise ValueError(f"pipe is a {name}, not a pipeline: load one with DiffusionPipeline.from_pretrained")
    for family in FAMILIES:
        model = pipe.components.get(family.component)
        if name in family.pipelines and isinstance(model, family.dense_class):
            if family.is_pruned(model) and not pruned:
                raise ValueError(
                    f"the {family.component} of the pipeline is already pruned: prune the dense model to the smaller budget "
                    f"instead"
                )
            return family, model
    for family in FAMILIES if name in LAYOUTS else ():
        if name in family.pipelines:
            found, wanted = type(pipe.components.get(family.component)).__name__, family.dense_class.__name__
            raise ValueError(
                f"the {family.component} of the pipeline is a {found}, not a {wanted}: pass the model itself, not compiled "
                f"and not exported"
            )
    raise ValueError(f"a {name} is not supported; supported: {', '.join(LAYOUTS)}")


def _has_filled_in_scale(vae: VQModel) -> bool:
    """Whether a VQModel was loaded from a `config.json` without the scale of its latents, which nobody has set since."""
    filled_in = vae.config.get("_use_default_values") or ()
    return bool(vae.config.get("_name_or_path")) and "scaling_factor" in filled_in and vae.config.scaling_factor != 1
