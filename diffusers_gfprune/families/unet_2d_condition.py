"""The family of `UNet2DConditionModel`: the UNets of Stable Diffusion 1 and 2, SDXL and similar models.

Prunable are the channels of residual blocks and samplers, as in `UNet2DModel`, the channels inside of self- and
cross-attentions, the hidden channels of feed-forward layers, and those of the time, class and text embeddings. Inside of
transformers, hidden states keep their width, since layer norms read all of their channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from ..diffusion.batch import ModelInputs, check_integers
from ..diffusion.process import DiffusionProcess
from ..remote.unet_2d_condition_gfpruned import GFPrunedUNet2DConditionModel
from .limits import MAX_WIDTH, ConfigLimits, check_freq_shift, check_sample_size, is_int, refuse
from .unet_2d import MAX_LAYERS, UNet2DFamily

__all__ = ["LIMITS", "UNet2DConditionFamily"]

TEXT_TOKENS = 77  # of example inputs: those of CLIP
MAX_TRANSFORMER_LAYERS = 64  # in one transformer
TIME_IDS = 6  # of example inputs: original size, crop and target size

# Accepted values for each argument of `UNet2DConditionModel`, limited to what can be pruned. Layers of transformers are
# checked in `_check_transformer_layers`.
LIMITS = ConfigLimits(
    integers={
        "in_channels": (1, MAX_WIDTH),
        "out_channels": (1, 2 * MAX_WIDTH),
        "block_out_channels": (1, MAX_WIDTH),
        "layers_per_block": (1, 64),
        "downsample_padding": (0, 1),  # other values change the size of images
        "norm_num_groups": (1, MAX_WIDTH),
        "cross_attention_dim": (1, MAX_WIDTH),
        "encoder_hid_dim": (1, MAX_WIDTH),
        "attention_head_dim": (1, MAX_WIDTH),
        "addition_time_embed_dim": (2, MAX_WIDTH),
        "num_class_embeds": (1, 10**7),
        "time_embedding_dim": (1, MAX_WIDTH),
        "time_cond_proj_dim": (1, MAX_WIDTH),
        "conv_in_kernel": (1, 31),
        "conv_out_kernel": (1, 31),
        "projection_class_embeddings_input_dim": (1, MAX_WIDTH),
        "addition_embed_type_num_heads": (1, MAX_WIDTH),  # not used
    },
    numbers={
        "freq_shift": (0, MAX_WIDTH),
        "mid_block_scale_factor": (1e-3, 1e3),  # a divisor
        "dropout": (0, 1),
        "norm_eps": (1e-12, 1),  # added to a variance, in single precision
        "resnet_out_scale_factor": (1e-3, 1e3),  # a divisor
    },
    choices={
        "center_input_sample": (False, True),
        "flip_sin_to_cos": (False, True),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "only_cross_attention": (False, True),
        "act_fn": ("silu", "swish", "mish", "gelu", "relu"),
        "encoder_hid_dim_type": ("text_proj",),
        "num_attention_heads": (None,),
        "dual_cross_attention": (False,),
        "use_linear_projection": (False, True),
        "class_embed_type": ("timestep", "identity", "projection", "simple_projection"),
        "addition_embed_type": ("text_time",),
        "upcast_attention": (False, True),
        "resnet_time_scale_shift": ("default", "scale_shift"),
        "resnet_skip_time_act": (False, True),
        "time_embedding_type": ("positional", "fourier"),
        "time_embedding_act_fn": ("silu", "swish", "mish", "gelu"),
        "timestep_post_act": ("silu", "swish", "mish", "gelu"),
        "attention_type": ("default",),
        "class_embeddings_concat": (False, True),
        "mid_block_only_cross_attention": (False, True),  # not used
        "cross_attention_norm": (None,),
    },
    lists=frozenset({"block_out_channels", "down_block_types", "up_block_types"}),
    optional=frozenset(
        {
            *("sample_size", "mid_block_type", "encoder_hid_dim", "encoder_hid_dim_type", "class_embed_type"),
            *("addition_embed_type", "addition_time_embed_dim", "num_class_embeds", "time_embedding_dim"),
            *("time_embedding_act_fn", "timestep_post_act", "time_cond_proj_dim", "projection_class_embeddings_input_dim"),
            *("mid_block_only_cross_attention", "upcast_attention"),  # SDXL is saved with null
        }
    ),
    either=frozenset({"only_cross_attention", "layers_per_block", "cross_attention_dim", "attention_head_dim"}),
)
TRANSFORMER_LAYERS = ("transformer_layers_per_block", "reverse_transformer_layers_per_block")


def _per_block(config: Mapping[str, Any], name: str) -> list:
    """Values of an argument for each block."""
    value = config[name]
    return list(value) if isinstance(value, (list, tuple)) else [value] * len(config["block_out_channels"])


class UNet2DConditionFamily(UNet2DFamily):
    """`UNet2DConditionModel`, with the blocks and options in `LIMITS`."""

    dense_class = UNet2DConditionModel
    pruned_class = GFPrunedUNet2DConditionModel
    output_class = UNet2DConditionOutput
    pipelines = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "LDMTextToImagePipeline")
    never_pruned = frozenset()

    # --- configurations ---

    def check_arguments(self, config: Mapping[str, Any]) -> None:
        LIMITS.check({name: value for name, value in config.items() if name not in TRANSFORMER_LAYERS})
        widths, groups = config["block_out_channels"], config["norm_num_groups"]
        for name in ("down_block_types", "up_block_types", *LIMITS.either):
            if isinstance(config[name], (list, tuple)) and len(config[name]) != len(widths):
                refuse(name, config[name], f"a list with {len(widths)} entries, as block_out_channels")
        self._check_transformer_layers(config)
        if any(width % groups for width in widths):
            refuse("norm_num_groups", groups, f"a divisor of all of block_out_channels={list(widths)}")
        kinds = [down + up for down, up in zip(config["down_block_types"], reversed(config["up_block_types"]))]
        kinds[-1] += str(config["mid_block_type"])
        for kind, heads, width in zip(kinds, _per_block(config, "attention_head_dim"), widths):
            if "Attn" in kind and heads > width:  # it is the number of heads, or in AttnDownBlock2D their size
                refuse("attention_head_dim", config["attention_head_dim"], f"at most block_out_channels={list(widths)}")
        for name in ("conv_in_kernel", "conv_out_kernel"):
            if config[name] % 2 == 0:
                refuse(name, config[name], "odd, since other kernels change the size of images")
        self._check_embeddings(config)
        check_sample_size(config["sample_size"], config["in_channels"], 1)
        self.check_supported(config)

    def _check_transformer_layers(self, config: Mapping[str, Any]) -> None:
        """Check the numbers of layers: one, one for each block, or one for each transformer in each block."""
        blocks, most = len(config["block_out_channels"]), MAX_TRANSFORMER_LAYERS
        layers = _per_block(config, "layers_per_block")
        for name in TRANSFORMER_LAYERS:
            value, up = config[name], name.startswith("reverse")
            if value is None and up:
                continue
            many = isinstance(value, (list, tuple))
            entries = value if many else [value] * blocks
            if len(entries) != blocks or (up and not many):
                single = "" if up else "an integer, or "
                refuse(name, value, f"{single}a list with {blocks} entries, as block_out_channels")
            counts = [count + 1 for count in reversed(layers)] if up else layers
            for entry, count in zip(entries, counts):
                each = entry if isinstance(entry, (list, tuple)) else [entry] * count
                if len(each) != count or not all(is_int(number) and 1 <= number <= most for number in each):
                    refuse(name, value, f"integers from 1 to {most}, or lists of {count} of them for {count} transformers")
            total = sum(sum(entry) if isinstance(entry, (list, tuple)) else entry * n for entry, n in zip(entries, counts))
            if total > MAX_LAYERS or sum(counts) > MAX_LAYERS:
                refuse(name, value, f"at most {MAX_LAYERS} layers in all blocks with layers_per_block={layers}")
        nested = any(isinstance(entry, (list, tuple)) for entry in _per_block(config, TRANSFORMER_LAYERS[0]))
        if nested and config[TRANSFORMER_LAYERS[1]] is None:
            refuse(TRANSFORMER_LAYERS[1], None, f"a list, with lists in {TRANSFORMER_LAYERS[0]}")

    def _check_embeddings(self, config: Mapping[str, Any]) -> None:
        """Check embeddings of time, classes and text."""
        first, kind, added = config["block_out_channels"][0], config["class_embed_type"], config["addition_embed_type"]
        if config["time_embedding_type"] == "positional":
            check_freq_shift(config["freq_shift"], first, f"block_out_channels[0]={first}")
        elif (config["time_embedding_dim"] or 2) % 2:
            refuse("time_embedding_dim", config["time_embedding_dim"], 'even for time_embedding_type="fourier"')
        dim, time = config["projection_class_embeddings_input_dim"], config["addition_time_embed_dim"]
        if kind in ("projection", "simple_projection") and dim is None:
            refuse("projection_class_embeddings_input_dim", dim, f"an integer for class_embed_type={kind}")
        if added is not None:
            if time is None or time % 2:
                refuse("addition_time_embed_dim", time, f"an even integer for addition_embed_type={added}")
            if dim is None or dim <= time:
                refuse("projection_class_embeddings_input_dim", dim, f"larger than addition_time_embed_dim={time}")
            check_freq_shift(config["freq_shift"], time, f"addition_time_embed_dim={time}")
            if config["class_embeddings_concat"]:
                refuse("class_embeddings_concat", True, f"False for addition_embed_type={added}")
        if config["encoder_hid_dim_type"] is not None and config["encoder_hid_dim"] is None:
            refuse("encoder_hid_dim", None, f"an integer for encoder_hid_dim_type={config['encoder_hid_dim_type']}")
        reads = _per_block(config, "cross_attention_dim")
        if len(set(reads)) > 1 or (config["encoder_hid_dim"] is not None and not is_int(config["cross_attention_dim"])):
            refuse("cross_attention_dim", config["cross_attention_dim"], "one integer, since all blocks read the same states")

    def check_supported(self, config: Mapping[str, Any]) -> None:
        for name, supported in LIMITS.choices.items():
            value = config[name]
            supported = (*supported, None) if name in LIMITS.optional else supported
            for choice in value if isinstance(value, (list, tuple)) else [value]:
                plain = choice.removeprefix("UNetRes") if isinstance(choice, str) and name in LIMITS.lists else choice
                if plain not in supported:
                    raise ValueError(f"{name}={choice} cannot be pruned; it must be {_listed(supported)}")
        reads, writes = config["in_channels"], config["out_channels"]
        if writes not in (reads, 2 * reads):
            raise ValueError(f"out_channels={writes} must be in_channels={reads}, or {2 * reads} with learned variances")

    def check_trainable(self, config: Mapping[str, Any]) -> None:
        reads, writes = config["in_channels"], config["out_channels"]
        if writes not in (reads, 2 * reads):
            raise ValueError(
                f"in_channels={reads} and out_channels={writes}: UNets that read a mask or an image beside the sample, as for "
                f"inpainting, cannot be trained"
            )
        for name in ("class_embed_type", "num_class_embeds", "time_cond_proj_dim"):
            if config[name] is not None:
                raise ValueError(f"{name}={config[name]}: UNets with conditions other than text cannot be trained")
        if config["sample_size"] is None:
            raise ValueError("sample_size=None in its config: set it to the size the model was trained at")

    def check_process(self, config: Mapping[str, Any], process: DiffusionProcess) -> None:
        """Any timestep can be embedded."""

    # --- parts ---

    def removable_blocks(self, model: nn.Module) -> dict[str, tuple[str, ...]]:
        blocks, reads_text = super().removable_blocks(model), False
        for name, module in model.named_modules():
            if isinstance(module, Transformer2DModel):
                layers = {f"{name}.transformer_blocks.{i}": layer for i, layer in enumerate(module.transformer_blocks)}
                found = {name: (f"{name}.proj_out",)} if len(layers) == 1 else {k: _branch(k, v) for k, v in layers.items()}
                if not reads_text:  # the first layer is never removed
                    found.pop(next(iter(found)))
                    reads_text = True
                blocks |= found
        return blocks

    def residual_streams(self, model: nn.Module) -> dict[str, tuple[str, str]]:
        streams = super().residual_streams(model)
        for name, module in model.named_modules():
            if isinstance(module, Transformer2DModel):
                streams[f"{name}.proj_out"] = (name, "input")
            elif isinstance(module, BasicTransformerBlock):
                for layer, norm in (("attn1.to_out.0", "norm1"), ("attn2.to_out.0", "norm2"), ("ff.net.2", "norm3")):
                    if getattr(module, layer.partition(".")[0]) is not None:
                        streams[f"{name}.{layer}"] = (f"{name}.{norm}", "input")
        return streams

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
        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(batch_size, *shape, device=device, dtype=dtype)

        shapes = self._conditioning_shapes(model)
        conditioning = {name: zeros(*shape) for name, shape in shapes.items()}
        if "class_labels" in shapes and not shapes["class_labels"]:
            conditioning["class_labels"] = zeros(dtype=torch.long)
        return ModelInputs(zeros(model.config.in_channels, height, width), zeros(dtype=torch.long), conditioning)

    def _conditioning_shapes(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """Shapes of all conditioning of example inputs, without the batch."""
        config = model.config
        dim, time = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
        reads = _per_block(config, "cross_attention_dim")[0] if config.encoder_hid_dim is None else config.encoder_hid_dim
        shapes: dict[str, tuple[int, ...]] = {"encoder_hidden_states": (TEXT_TOKENS, reads)}
        if config.class_embed_type == "identity":
            per_channel = 2 if config.time_embedding_type == "fourier" else 4
            shapes["class_labels"] = (config.time_embedding_dim or per_channel * config.block_out_channels[0],)
        elif model.class_embedding is not None:
            shapes["class_labels"] = (dim,) if "projection" in (config.class_embed_type or "") else ()
        if config.time_cond_proj_dim is not None:
            shapes["timestep_cond"] = (config.time_cond_proj_dim,)
        if config.addition_embed_type is not None:
            ids = min(TIME_IDS, (dim - 1) // time)
            shapes |= {"text_embeds": (dim - ids * time,), "time_ids": (ids,)}
        return shapes

    def check_conditioning(self, model: nn.Module, conditioning: Mapping[str, Tensor], size: int) -> None:
        config, shapes = model.config, self._conditioning_shapes(model)
        if other := [name for name in conditioning if name not in (*shapes, "encoder_attention_mask")]:
            raise ValueError(f"the batch has {other[0]}, which this UNet2DConditionModel does not take")
        if missing := [name for name in shapes if name not in conditioning and name != "timestep_cond"]:
            raise ValueError(f"the model needs {missing[0]}, but the batch has none")
        if config.class_embed_type is None and "class_labels" in shapes:
            count = config.num_class_embeds
            because = f"with num_class_embeds={count} of the model, "
            check_integers("class_labels", conditioning["class_labels"], size, count, because)
        tokens = conditioning["encoder_hidden_states"].shape[1:2]
        if "time_ids" in shapes:  # any number that fits
            wide = config.projection_class_embeddings_input_dim
            ids = conditioning["time_ids"].shape[1:2].numel()
            shapes |= {"text_embeds": (wide - ids * config.addition_time_embed_dim,), "time_ids": (ids,)}
        shapes |= {
            "encoder_hidden_states": (*tokens, shapes["encoder_hidden_states"][1]),
            "encoder_attention_mask": (*tokens,),
        }
        for name, values in conditioning.items():
            wanted = (size, *shapes[name])
            if tuple(values.shape) != wanted:
                raise ValueError(f"{name} have shape {tuple(values.shape)}, but the model and the batch need {wanted}")
            embedded = len(wanted) > 1 and name not in ("time_ids", "encoder_attention_mask")
            if embedded and not values.is_floating_point():
                raise ValueError(f"{name} have dtype {values.dtype}; they must be embeddings, in floating point")

    def attributes_for_pipelines(self, config: Mapping[str, Any]) -> dict[str, object]:
        """SDXL's pipeline compares the width of its embeddings with that of this layer."""
        width = config["projection_class_embeddings_input_dim"]
        return {} if width is None else {"add_embedding": SimpleNamespace(linear_1=SimpleNamespace(in_features=width))}

    def output(self, model: Callable[..., Any], inputs: ModelInputs) -> Tensor:
        added = {name: inputs.conditioning[name] for name in ("text_embeds", "time_ids") if name in inputs.conditioning}
        rest = {name: values for name, values in inputs.conditioning.items() if name not in added}
        rest |= {"added_cond_kwargs": added} if added else {}
        return model(inputs.sample, inputs.timesteps, **rest).sample


def _branch(name: str, layer: nn.Module) -> tuple[str, ...]:
    """Layers of a transformer's layer whose outputs are added to the hidden states."""
    attentions = [key for key in ("attn1", "attn2") if getattr(layer, key) is not None]
    return *(f"{name}.{key}.to_out.0" for key in attentions), f"{name}.ff.net.2"


def _listed(values: tuple) -> str:
    return f"{'one of ' if len(values) > 1 else ''}{', '.join(map(str, values))}"
