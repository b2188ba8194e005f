"""The family of `UNet2DModel`: the UNets of DDPMs, unconditional or with class labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from ..diffusion.batch import ModelInputs, check_integers
from ..diffusion.process import DiffusionProcess
from ..remote.pipeline_prune_ddpm import COMPONENTS, PIPELINES
from ..remote.unet_2d_gfpruned import GFPrunedUNet2DModel
from .base import Family
from .limits import MAX_WIDTH, ConfigLimits, check_freq_shift, check_sample_size, refuse

__all__ = ["LIMITS", "UNet2DFamily"]

MAX_LAYERS_PER_BLOCK = 64
MAX_LAYERS = 256  # in all down blocks
FIRST_BLOCK = "down_blocks.0.resnets.0"  # never removed, so that the model always reads its timestep

# Accepted values for each argument of `UNet2DModel`, limited to blocks that can be pruned.
LIMITS = ConfigLimits(
    integers={
        "in_channels": (1, MAX_WIDTH),
        "out_channels": (1, MAX_WIDTH),
        "block_out_channels": (1, MAX_WIDTH),
        "layers_per_block": (1, MAX_LAYERS_PER_BLOCK),
        "downsample_padding": (0, 1),  # other values change the size of images
        "attention_head_dim": (1, MAX_WIDTH),
        "norm_num_groups": (1, MAX_WIDTH),
        "attn_norm_num_groups": (1, MAX_WIDTH),
        "time_embedding_dim": (1, MAX_WIDTH),
        "num_class_embeds": (1, 10**7),
        "num_train_timesteps": (1, 10**7),
    },
    numbers={
        "freq_shift": (0, MAX_WIDTH),
        "mid_block_scale_factor": (1e-3, 1e3),  # a divisor
        "dropout": (0, 1),
        "norm_eps": (1e-12, 1),  # added to a variance, in single precision
    },
    choices={
        "center_input_sample": (False, True),
        "flip_sin_to_cos": (False, True),
        "add_attention": (False, True),
        "time_embedding_type": ("positional", "fourier", "learned"),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "mid_block_type": ("UNetMidBlock2D",),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": ("conv", "resnet"),
        "upsample_type": ("conv", "resnet"),
        "act_fn": ("silu", "swish", "mish", "gelu", "relu"),
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "class_embed_type": ("timestep", "identity"),
    },
    lists=frozenset({"block_out_channels", "down_block_types", "up_block_types"}),
    optional=frozenset(
        {
            *("sample_size", "attention_head_dim", "attn_norm_num_groups", "time_embedding_dim", "num_class_embeds"),
            *("num_train_timesteps", "mid_block_type", "downsample_type", "upsample_type", "class_embed_type"),
        }
    ),
)


class UNet2DFamily(Family):
    """`UNet2DModel`, with the blocks in `LIMITS`."""

    dense_class = UNet2DModel
    pruned_class = GFPrunedUNet2DModel
    output_class = UNet2DOutput
    attention_class = Attention
    component = COMPONENTS[0]
    pipelines = (*PIPELINES, "ConsistencyModelPipeline", "LDMPipeline")
    boundary = {"conv_in": 0, "conv_out": 1}
    never_pruned = frozenset({"time_proj"})  # the table of learned time embeddings

    # --- configurations ---

    def check_arguments(self, config: Mapping[str, Any]) -> None:
        LIMITS.check(config)
        widths, groups, shift = config["block_out_channels"], config["norm_num_groups"], config["freq_shift"]
        for name in ("down_block_types", "up_block_types"):
            if len(config[name]) != len(widths):
                refuse(name, config[name], f"a list with {len(widths)} entries, as block_out_channels")
        if len(widths) * config["layers_per_block"] > MAX_LAYERS:
            most = f"at most {MAX_LAYERS // len(widths)} in {len(widths)} blocks"
            refuse("layers_per_block", config["layers_per_block"], most)
        if any(width % groups for width in widths):
            refuse("norm_num_groups", groups, f"a divisor of all of block_out_channels={list(widths)}")
        groups = config["attn_norm_num_groups"]
        if groups is not None and config["add_attention"] and config["mid_block_type"] is not None and widths[-1] % groups:
            refuse("attn_norm_num_groups", groups, f"a divisor of {widths[-1]}, the last of block_out_channels")
        if config["time_embedding_type"] == "positional":
            check_freq_shift(shift, widths[0], f"block_out_channels[0]={widths[0]}")
        if config["time_embedding_type"] == "learned" and config["num_train_timesteps"] is None:
            refuse("num_train_timesteps", None, 'an integer for time_embedding_type="learned"')
        check_sample_size(config["sample_size"], config["in_channels"], 2 ** (len(widths) - 1))

    def check_supported(self, config: Mapping[str, Any]) -> None:
        for argument in ("down_block_types", "up_block_types", "mid_block_type", "resnet_time_scale_shift"):
            value, supported = config[argument], LIMITS.choices[argument]
            supported = (*supported, None) if argument in LIMITS.optional else supported
            for choice in value if isinstance(value, (list, tuple)) else [value]:
                if (choice[7:] if str(choice).startswith("UNetRes") else choice) not in supported:
                    raise ValueError(f"{argument}={choice} cannot be pruned; supported: {', '.join(map(str, supported))}")

    def check_trainable(self, config: Mapping[str, Any]) -> None:
        reads, writes = config["in_channels"], config["out_channels"]
        if writes not in (reads, 2 * reads):
            raise ValueError(f"out_channels={writes} must be in_channels={reads}, or {2 * reads} with learned variances")
        if config["sample_size"] is None:
            raise ValueError("sample_size=None in its config: set it to the size the model was trained at")

    def check_process(self, config: Mapping[str, Any], process: DiffusionProcess) -> None:
        kind, rows = config["time_embedding_type"], config["num_train_timesteps"]
        if kind == "fourier" and process.timestep_range[0] < 0:
            raise ValueError(
                f"time_embedding_type=fourier must be positional: outputs would be divided by timesteps, which are 0 or less "
                f"at low noise levels of {process.title}"
            )
        if kind == "learned" and not process.has_integer_timesteps:
            raise ValueError(f"time_embedding_type=learned must be positional: timesteps of {process.title} are no integers")
        if kind == "learned" and rows < process.num_train_timesteps:
            raise ValueError(
                f"num_train_timesteps={process.num_train_timesteps} of the scheduler must be at most "
                f"num_train_timesteps={rows} of the model, whose time embedding is learned"
            )

    # --- inputs ---

    def example_inputs(
        self,
        model: nn.Module,
        height: int,
        width: int,
        batch_size: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> ModelInputs:
        sample = torch.zeros(batch_size, model.config.in_channels, height, width, device=device, dtype=dtype)
        timesteps = torch.zeros(batch_size, device=device, dtype=torch.long)
        if model.config.class_embed_type == "identity":
            labels = torch.zeros(batch_size, model.time_embedding.linear_2.out_features, device=device, dtype=dtype)
        elif model.class_embedding is not None:
            labels = torch.zeros(batch_size, device=device, dtype=torch.long)
        else:
            return ModelInputs(sample, timesteps)
        return ModelInputs(sample, timesteps, {"class_labels": labels})

    def tracing_size(self, config: Mapping[str, Any]) -> tuple[int, int]:
        side = 2 ** len(config["block_out_channels"])
        return side, side

    def check_conditioning(self, model: nn.Module, conditioning: Mapping[str, Tensor], size: int) -> None:
        config, labels = model.config, conditioning.get("class_labels")
        if other := [name for name in conditioning if name != "class_labels"]:
            raise ValueError(f"the batch has {other[0]}, which a UNet2DModel does not take")
        if model.class_embedding is None:
            if labels is not None:
                raise ValueError("the model is unconditional, but the batch has class_labels: leave them out")
        elif labels is None:
            raise ValueError("the model needs class_labels, but the batch has none")
        elif config.class_embed_type == "identity":
            shape = (size, model.time_embedding.linear_2.out_features)
            if not labels.is_floating_point() or labels.shape != shape:
                raise ValueError(
                    f"class_labels have shape {tuple(labels.shape)}, {labels.dtype}; with class_embed_type=identity they must "
                    f"be embeddings, floating point with shape {shape}"
                )
        elif config.class_embed_type == "timestep":
            if labels.shape != (size,):
                shape = tuple(labels.shape)
                raise ValueError(f"class_labels have shape {shape}, not {(size,)}, with class_embed_type=timestep")
        else:
            count = config.num_class_embeds
            check_integers("class_labels", labels, size, count, f"with num_class_embeds={count} of the model, ")

    def vector_size(self, config: Mapping[str, Any]) -> int | None:
        if config["class_embed_type"] != "identity":
            return None
        return config.get("time_embedding_dim") or 4 * config["block_out_channels"][0]

    # --- parts ---

    def residual_blocks(self, model: nn.Module) -> dict[str, nn.Module]:
        return {name: module for name, module in model.named_modules() if isinstance(module, ResnetBlock2D)}

    def removable_blocks(self, model: nn.Module) -> dict[str, tuple[str, ...]]:
        blocks = {}
        for name, module in model.named_modules():
            if isinstance(module, ResnetBlock2D) and name != FIRST_BLOCK:
                blocks[name] = (f"{name}.conv2",)
            elif isinstance(module, Attention) and module.residual_connection:
                blocks[name] = (f"{name}.to_out.0",)
        return blocks

    def residual_streams(self, model: nn.Module) -> dict[str, tuple[str, str]]:
        streams = {}
        for name, module in model.named_modules():
            if isinstance(module, ResnetBlock2D):
                if module.conv_shortcut is not None:  # it runs after the branch
                    streams[f"{name}.conv_shortcut"] = (f"{name}.conv2", "output")
                elif module.upsample is None and module.downsample is None:
                    streams[f"{name}.conv2"] = (name, "input")
            elif isinstance(module, Attention) and module.residual_connection:
                streams[f"{name}.to_out.0"] = (name, "input")
        return streams

    def block_outputs(self, model: nn.Module) -> dict[str, str]:
        names = [f"{kind}_blocks.{index}" for kind in ("down", "up") for index in range(len(getattr(model, f"{kind}_blocks")))]
        if model.mid_block is not None:
            names.insert(len(model.down_blocks), "mid_block")
        return {name: f"{name}.{_last_layer(model.get_submodule(name))}" for name in names}


def _last_layer(block: nn.Module) -> str:
    """Name of the last convolution inside a block. A following attention adds to the same channels."""
    kind = next(kind for kind in ("downsamplers", "upsamplers", "resnets") if getattr(block, kind, None) is not None)
    layers = getattr(block, kind)
    return f"{kind}.{len(layers) - 1}.{'conv2' if hasattr(layers[-1], 'conv2') else 'conv'}"
