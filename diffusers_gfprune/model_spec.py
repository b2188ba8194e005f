"""What training data must know of a model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .diffusion.class_labels import ClassLabels
from .diffusion.latents import LatentCodec
from .diffusion.prompts import PromptEncoder
from .families.lookup import family_of
from .metrics.model_size import spatial_size

__all__ = ["ModelSpec"]


@dataclass(frozen=True)
class ModelSpec:
    """Images and conditioning that a model takes.

    Attributes:
        size: Height and width of images in pixels.
        channels: Channels of images: 1 (greyscale) or 3 (RGB).
        labels: Class labels; None: the model takes none.
        codec: The VAE of a latent model; None: the model takes pixels.
        prompts: Text encoders of a text-conditional model; None: the model takes no captions.
        vector_size: Number of values of the vectors that the model is conditioned on; None: it takes none.
    """

    size: tuple[int, int]
    channels: int
    labels: ClassLabels | None = None
    codec: LatentCodec | None = None
    prompts: PromptEncoder | None = None
    vector_size: int | None = None

    @property
    def takes_rows(self) -> bool:
        """Whether images have conditions that only a data set or its user can give: captions or vectors."""
        return self.prompts is not None or self.vector_size is not None

    @classmethod
    def of(cls, model: nn.Module, codec: LatentCodec | None = None, prompts: PromptEncoder | None = None) -> ModelSpec:
        """What a model takes, with the VAE and the text encoders of its pipeline, if any.

        Raises:
            ValueError: The VAE or a text encoder does not fit the model, or the model takes other images or conditioning.
        """
        family, config = family_of(model), model.config
        conditioning = family.example_inputs(model, *family.tracing_size(config)).conditioning
        if prompts is not None:
            if codec is None:
                raise ValueError("the model takes captions, but its pipeline has no VAE: text needs a latent model")
            prompts.check_fits(conditioning)
        elif "encoder_hidden_states" in conditioning:
            raise ValueError("the model takes captions, but its pipeline has no text encoder")
        size, channels = spatial_size(model), config.in_channels
        if codec is not None:
            codec.check_fits(channels)
            channels, *sides = codec.image_shape(*size)
            size = (sides[0], sides[1])
        elif channels not in (1, 3):
            raise ValueError(f"in_channels={channels} of the model must be 1 (greyscale) or 3 (RGB)")
        vector_size = family.vector_size(config)
        if vector_size is not None and codec is not None:
            raise ValueError("class_embed_type=identity must be None in latent pipelines: only models of pixels take vectors")
        return cls(size, channels, family.class_labels(config), codec, prompts, vector_size)
