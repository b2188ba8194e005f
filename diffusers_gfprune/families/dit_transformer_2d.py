"""The family of `DiTTransformer2DModel`: diffusion transformers with class labels (DiT, arXiv 2212.09748).

Prunable are the channels inside of attentions, the hidden channels of feed-forward layers, and those of the conditioning of
each block. The hidden states keep their width, since layer norms read all of their channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import LabelEmbedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from ..diffusion.batch import ModelInputs, check_integers
from ..diffusion.class_labels import ClassLabels
from ..diffusion.process import DiffusionProcess
from ..remote.dit_transformer_2d_gfpruned import GFPrunedDiTTransformer2DModel
from .base import Family
from .limits import MAX_WIDTH, ConfigLimits, check_patches

__all__ = ["LIMITS", "DiTTransformer2DFamily"]

# Accepted values for each argument of `DiTTransformer2DModel`
LIMITS = ConfigLimits(
    integers={
        "num_attention_heads": (1, MAX_WIDTH),
        "attention_head_dim": (1, MAX_WIDTH),
        "in_channels": (1, MAX_WIDTH),
        "out_channels": (1, 2 * MAX_WIDTH),
        "num_layers": (1, 256),
        "norm_num_groups": (1, MAX_WIDTH),  # not used
        "patch_size": (1, 2**8),
        "num_embeds_ada_norm": (1, 10**7),
    },
    numbers={
        "dropout": (0, 1),
        "norm_eps": (1e-12, 1),  # added to a variance, in single precision
    },
    choices={
        "attention_bias": (False, True),
        "activation_fn": ("gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu"),
        "upcast_attention": (False, True),
        "norm_type": ("ada_norm_zero",),
        "norm_elementwise_affine": (False, True),
    },
    lists=frozenset(),
    optional=frozenset({"out_channels"}),
)


class DiTTransformer2DFamily(Family):
    """`DiTTransformer2DModel`, with and without learned variances."""

    dense_class = DiTTransformer2DModel
    pruned_class = GFPrunedDiTTransformer2DModel
    output_class = Transformer2DModelOutput
    attention_class = Attention
    component = "transformer"
    pipelines = ("DiTPipeline",)
    earlier_names = ("Transformer2DModel",)
    boundary = {"pos_embed.proj": 0, "proj_out_2": 1}

    # --- configurations ---

    def check_arguments(self, config: Mapping[str, Any]) -> None:
        LIMITS.check(config)
        check_patches(config)
        self.check_supported(config)

    def check_supported(self, config: Mapping[str, Any]) -> None:
        reads, writes, size, patch = (config[name] for name in ("in_channels", "out_channels", "sample_size", "patch_size"))
        if writes not in (None, reads, 2 * reads):
            raise ValueError(f"out_channels={writes} must be in_channels={reads}, or {2 * reads} with learned variances")
        if size % patch:
            raise ValueError(f"sample_size={size} must be a multiple of patch_size={patch}")

    def check_trainable(self, config: Mapping[str, Any]) -> None:
        """All supported configurations can be trained."""

    def check_process(self, config: Mapping[str, Any], process: DiffusionProcess) -> None:
        """Any timestep can be embedded."""

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
        if height != width or height % patch:
            raise ValueError(
                f"samples of {height}x{width} must be square, with sides that are multiples of patch_size={patch}"
            )
        sample = torch.zeros(batch_size, model.config.in_channels, height, width, device=device, dtype=dtype)
        timesteps, labels = (torch.zeros(batch_size, device=device, dtype=torch.long) for _ in range(2))
        return ModelInputs(sample, timesteps, {"class_labels": labels})

    def tracing_size(self, config: Mapping[str, Any]) -> tuple[int, int]:
        return 2 * config["patch_size"], 2 * config["patch_size"]

    def check_conditioning(self, model: nn.Module, conditioning: Mapping[str, Tensor], size: int) -> None:
        if other := [name for name in conditioning if name != "class_labels"]:
            raise ValueError(f"the batch has {other[0]}, which a DiTTransformer2DModel does not take")
        if "class_labels" not in conditioning:
            raise ValueError("the model needs class_labels, but the batch has none")
        null = model.config.num_embeds_ada_norm
        because = f"with num_embeds_ada_norm={null} of the model, whose null label is {null}, "
        check_integers("class_labels", conditioning["class_labels"], size, null + 1, because)

    def class_labels(self, config: Mapping[str, Any]) -> ClassLabels:
        count = config["num_embeds_ada_norm"]
        return ClassLabels(count, null_label=count, argument="num_embeds_ada_norm")

    def prepare_training(self, model: nn.Module) -> nn.Module:
        """Switch off the label dropout of `LabelEmbedding`: each block would draw other labels, and the teacher none.

        Labels are dropped in the batch instead (`diffusion.class_labels`), for all blocks and both models alike.
        """
        for module in model.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0
        return model

    # --- parts ---

    def residual_blocks(self, model: nn.Module) -> dict[str, nn.Module]:
        return {}  # dropout is inside of attentions and feed-forward layers

    def removable_blocks(self, model: nn.Module) -> dict[str, tuple[str, ...]]:
        # The output is conditioned on the embedding of the first block
        names = [f"transformer_blocks.{index}" for index in range(1, len(model.transformer_blocks))]
        return {name: (f"{name}.attn1.to_out.0", f"{name}.ff.net.2") for name in names}

    def block_outputs(self, model: nn.Module) -> dict[str, str]:
        names = [f"transformer_blocks.{index}" for index in range(len(model.transformer_blocks))]
        return {name: f"{name}.ff.net.2" for name in names}
