"""The family of `PixArtTransformer2DModel`: diffusion transformers with text (PixArt-alpha, arXiv 2310.00426; PixArt-Sigma,
arXiv 2403.04692).

Prunable are the channels inside of self- and cross-attentions, the hidden channels of feed-forward layers, and those of the
embeddings of time, sizes and text. The hidden states keep their width, since layer norms read all of their channels. So does
the projected text, which the model views as tokens of this width. One layer makes the scales and shifts of all blocks: a block
that is removed takes its table of offsets with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from ..diffusion.batch import ModelInputs, check_integers
from ..remote.pixart_transformer_2d_gfpruned import GFPrunedPixArtTransformer2DModel
from . import dit_transformer_2d
from .limits import MAX_WIDTH, ConfigLimits, check_patches

__all__ = ["LIMITS", "PixArtTransformer2DFamily"]

TEXT_TOKENS = 120  # of example inputs, as PixArtAlphaPipeline pads prompts
MASK = "encoder_attention_mask"
SIZES = {"resolution": 2, "aspect_ratio": 1}  # additional conditions, with their numbers of values
# The sample_size at which PixArtAlphaPipeline passes them, and at which they are the default
SIZED = 128

# Accepted values for each argument of `PixArtTransformer2DModel`
LIMITS = ConfigLimits(
    integers={
        **dit_transformer_2d.LIMITS.integers,
        "cross_attention_dim": (1, MAX_WIDTH),
        "caption_channels": (1, MAX_WIDTH),
    },
    numbers={
        **dit_transformer_2d.LIMITS.numbers,
        "interpolation_scale": (2**-10, 2**10),  # divides positions
    },
    choices={
        **dit_transformer_2d.LIMITS.choices,
        "norm_type": ("ada_norm_single",),
        "use_additional_conditions": (False, True),
        "attention_type": ("default",),
    },
    lists=frozenset(),
    optional=frozenset(
        {"out_channels", "caption_channels", "interpolation_scale", "use_additional_conditions", "attention_type"}
    ),
)


def _takes_sizes(config: Mapping[str, Any]) -> bool:
    """Whether the model takes resolutions and aspect ratios."""
    given = config["use_additional_conditions"]
    return config["sample_size"] == SIZED if given is None else given


class PixArtTransformer2DFamily(dit_transformer_2d.DiTTransformer2DFamily):
    """`PixArtTransformer2DModel`, with and without learned variances and additional conditions."""

    dense_class = PixArtTransformer2DModel
    pruned_class = GFPrunedPixArtTransformer2DModel
    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    boundary = {"pos_embed.proj": 0, "proj_out": 1}
    never_pruned = frozenset({"caption_projection.linear_2"})

    # --- configurations ---

    def check_arguments(self, config: Mapping[str, Any]) -> None:
        LIMITS.check(config)
        check_patches(config)
        self.check_supported(config)

    def check_supported(self, config: Mapping[str, Any]) -> None:
        super().check_supported(config)
        hidden, text = config["num_attention_heads"] * config["attention_head_dim"], config["cross_attention_dim"]
        if text is None:
            raise ValueError("cross_attention_dim=None must be an integer: models without text cannot be pruned")
        if config["caption_channels"] is not None and text != hidden:
            raise ValueError(
                f"cross_attention_dim={text} must be {hidden}, the width of the projected text (caption_channels)"
            )
        if config["attention_type"] not in (None, "default"):
            raise ValueError(f"attention_type={config['attention_type']} must be default: GLIGEN cannot be pruned")
        if _takes_sizes(config) and hidden % 3:
            given = f"use_additional_conditions={config['use_additional_conditions']} with sample_size={config['sample_size']}"
            raise ValueError(f"{given} must be False, or the hidden size {hidden} a multiple of 3, for its three embeddings")

    def check_pipeline(self, config: Mapping[str, Any], pipeline: str) -> None:
        """`PixArtAlphaPipeline` passes sizes to models with a `sample_size` of 128, and `PixArtSigmaPipeline` never."""
        super().check_pipeline(config, pipeline)
        if not _takes_sizes(config):
            return
        reason = f"the {pipeline} passes no resolution"
        if pipeline == "PixArtAlphaPipeline":
            if config["sample_size"] == SIZED:
                return
            reason += f" for sample_size={config['sample_size']}"
        raise ValueError(f"use_additional_conditions={config['use_additional_conditions']} must be False: {reason}")

    # --- inputs and outputs ---

    def example_inputs(
        self,
        model: nn.Module,
        height: int,
        width: int,
        batch_size: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> ModelInputs:
        patch = model.config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"samples of {height}x{width} must have sides that are multiples of patch_size={patch}")
        shapes = self._embedding_shapes(model.config)
        conditioning = {name: torch.zeros(batch_size, *shape, device=device, dtype=dtype) for name, shape in shapes.items()}
        conditioning[MASK] = torch.ones(batch_size, TEXT_TOKENS, device=device, dtype=torch.long)
        sample = torch.zeros(batch_size, model.config.in_channels, height, width, device=device, dtype=dtype)
        return ModelInputs(sample, torch.zeros(batch_size, device=device, dtype=torch.long), conditioning)

    def _embedding_shapes(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Shapes of conditioning in floating point, without the batch."""
        width = config["cross_attention_dim"] if config["caption_channels"] is None else config["caption_channels"]
        sizes = {name: (count,) for name, count in SIZES.items()} if _takes_sizes(config) else {}
        return {"encoder_hidden_states": (TEXT_TOKENS, width), **sizes}

    def check_conditioning(self, model: nn.Module, conditioning: Mapping[str, Tensor], size: int) -> None:
        shapes = self._embedding_shapes(model.config)
        if other := [name for name in conditioning if name not in (*shapes, MASK)]:
            raise ValueError(f"the batch has {other[0]}, which this PixArtTransformer2DModel does not take")
        if missing := [name for name in shapes if name not in conditioning]:
            raise ValueError(f"the model needs {missing[0]}, but the batch has none")
        tokens = conditioning["encoder_hidden_states"].shape[1:2]
        shapes["encoder_hidden_states"] = (*tokens, shapes["encoder_hidden_states"][1])
        for name, values in conditioning.items():
            wanted = (size, *(tokens if name == MASK else shapes[name]))
            if tuple(values.shape) != wanted:
                raise ValueError(f"{name} have shape {tuple(values.shape)}, but the model and the batch need {wanted}")
            if name != MASK and not values.is_floating_point():
                raise ValueError(f"{name} have dtype {values.dtype}; they must be in floating point")
        if MASK in conditioning:
            check_integers(MASK, conditioning[MASK].flatten(), conditioning[MASK].numel(), 2, "1 for tokens of the text: ")

    def class_labels(self, config: Mapping[str, Any]) -> None:
        """The model takes none."""

    def output(self, model: Callable[..., Any], inputs: ModelInputs) -> Tensor:
        given = dict(inputs.conditioning)
        sizes = {name: given.pop(name) for name in SIZES if name in given}
        given |= {"added_cond_kwargs": sizes} if sizes else {}
        return model(inputs.sample, timestep=inputs.timesteps, **given).sample

    # --- parts ---

    def removable_blocks(self, model: nn.Module) -> dict[str, tuple[str, ...]]:
        # The first block reads the text
        return {
            name: (f"{name}.attn1.to_out.0", f"{name}.attn2.to_out.0", f"{name}.ff.net.2")
            for name in super().removable_blocks(model)
        }

    def residual_streams(self, model: nn.Module) -> dict[str, tuple[str, str]]:
        """Cross-attentions: the outputs of the other layers are scaled before they are added."""
        names = [name for name in self.attentions(model) if name.endswith(".attn2")]
        return {f"{name}.to_out.0": (name, "input") for name in names}
