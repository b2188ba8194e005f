"""What a config.json may hold: every argument of the dense model, and the three tables of a pruned one.

A config comes from the Hub. One that could not be built, would compute no number, or would allocate without bound is refused
by name before anything is built; tables that do not narrow the dense model are refused before anything is allocated.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Mapping

from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import nn

__all__ = ["check_arguments", "check_config_file", "check_tables"]

MAX_WIDTH = 2**16  # channels of a layer
MAX_LAYERS_PER_BLOCK = 64
MAX_LAYERS = 256  # of all blocks on the way down
MAX_PARAMETERS = 2**33  # of the dense model
MAX_SIDE = 2**14  # pixels of an image
MAX_SAMPLE_VALUES = 2**30  # of an image, in all


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refuse(name: str, value, wanted: str) -> None:
    raise ValueError(f"{name}={reprlib.repr(value)} must be {wanted}")


def check_config_file(path: str | os.PathLike) -> None:
    """Refuse a config.json that is no JSON object, by a ValueError. One that is no JSON is left to who reads it."""
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except RecursionError:
        config = None
    except ValueError:
        return
    if not isinstance(config, dict):  # Diffusers would take a string for the name of another repository
        raise ValueError("config.json must hold a JSON object, of a depth that can be read")
    if not isinstance(config.get("quantization_config", {}), (dict, type(None))):
        _refuse("quantization_config", config["quantization_config"], "a JSON object")


# --- arguments of the dense model --------------------------------------------------------------------------------------

# What each argument of `UNet2DModel` may be: the smallest and the largest value, or one of these. Blocks are those that can be
# pruned.
_INTEGERS = {
    "in_channels": (1, MAX_WIDTH),
    "out_channels": (1, MAX_WIDTH),
    "block_out_channels": (1, MAX_WIDTH),
    "layers_per_block": (1, MAX_LAYERS_PER_BLOCK),
    "downsample_padding": (0, 1),  # anything else changes the size of images
    "attention_head_dim": (1, MAX_WIDTH),
    "norm_num_groups": (1, MAX_WIDTH),
    "attn_norm_num_groups": (1, MAX_WIDTH),
    "time_embedding_dim": (1, MAX_WIDTH),
    "num_class_embeds": (1, 10**7),
    "num_train_timesteps": (1, 10**7),
}
_NUMBERS = {
    "freq_shift": (0, MAX_WIDTH),
    "mid_block_scale_factor": (1e-3, 1e3),  # of a division
    "dropout": (0, 1),
    "norm_eps": (1e-12, 1),  # added to a variance, in single precision
}
_CHOICES = {
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
}
_LISTS = {"block_out_channels", "down_block_types", "up_block_types"}
_OPTIONAL = {
    *("sample_size", "attention_head_dim", "attn_norm_num_groups", "time_embedding_dim", "num_class_embeds"),
    *("num_train_timesteps", "mid_block_type", "downsample_type", "upsample_type", "class_embed_type"),
}


def _check_value(name: str, value) -> None:
    """Refuse a value that is not in the tables above; one that they do not know, of a later Diffusers, must be plain JSON."""
    if name in _INTEGERS:
        low, high = _INTEGERS[name]
        if not _is_int(value) or not low <= value <= high:
            _refuse(name, value, f"an integer from {low} to {high}")
    elif name in _NUMBERS:
        low, high = _NUMBERS[name]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            _refuse(name, value, f"a number from {low:g} to {high:g}")
    elif name in _CHOICES:
        prefix = "UNetRes" if name in _LISTS and isinstance(value, str) else ""  # as Diffusers once named its blocks
        plain = value.removeprefix(prefix) if prefix else value
        if not any(type(plain) is type(choice) and plain == choice for choice in _CHOICES[name]):
            _refuse(name, value, f"one of {', '.join(map(str, _CHOICES[name]))}")
    else:
        entries = value if isinstance(value, (list, tuple)) else [value]
        plain = all(entry is None or isinstance(entry, (bool, str, int, float)) for entry in entries)
        if not plain or len(entries) > 64 or not all(math.isfinite(entry) for entry in entries if isinstance(entry, float)):
            _refuse(name, value, "a finite number, a string, a boolean, or a list of up to 64 of them")


def check_arguments(config: Mapping) -> None:
    """Refuse arguments of `UNet2DModel` that could not be built, would compute no number, or would allocate without bound.

    Args:
        config: All arguments of the dense model, by name.

    Raises:
        ValueError: The first that is wrong, by name and value.
    """
    for name, value in config.items():
        if name in _LISTS:
            if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= 16:
                _refuse(name, value, "a list with 1 to 16 entries")
            for entry in value:
                _check_value(name, entry)
        elif name != "sample_size" and not (value is None and name in _OPTIONAL):
            _check_value(name, value)
    widths, groups, shift = config["block_out_channels"], config["norm_num_groups"], config["freq_shift"]
    for name in ("down_block_types", "up_block_types"):
        if len(config[name]) != len(widths):
            _refuse(name, config[name], f"as many as block_out_channels, {len(widths)}")
    if len(widths) * config["layers_per_block"] > MAX_LAYERS:
        _refuse("layers_per_block", config["layers_per_block"], f"at most {MAX_LAYERS // len(widths)} in {len(widths)} blocks")
    if any(width % groups for width in widths):
        _refuse("norm_num_groups", groups, f"a divisor of all of block_out_channels={list(widths)}")
    groups = config["attn_norm_num_groups"]
    if groups is not None and config["add_attention"] and config["mid_block_type"] is not None and widths[-1] % groups:
        _refuse("attn_norm_num_groups", groups, f"a divisor of {widths[-1]}, the last of block_out_channels")
    last = max(widths[0] // 2 - 1, 0)
    if config["time_embedding_type"] == "positional" and shift > last:  # frequencies are divided by the difference
        _refuse("freq_shift", shift, f"a number from 0 to {last}, for block_out_channels that start with {widths[0]}")
    if config["time_embedding_type"] == "learned" and config["num_train_timesteps"] is None:
        _refuse("num_train_timesteps", None, 'an integer where time_embedding_type="learned"')
    _check_sample_size(config["sample_size"], config["in_channels"], 2 ** (len(widths) - 1))


def _check_sample_size(size, channels: int, multiple: int) -> None:
    sides = size if isinstance(size, (list, tuple)) else [size, size]
    fits = len(sides) == 2 and all(_is_int(side) and 1 <= side <= MAX_SIDE and side % multiple == 0 for side in sides)
    if size is not None and not (fits and channels * sides[0] * sides[1] <= MAX_SAMPLE_VALUES):
        most = f"{MAX_SAMPLE_VALUES // channels} pixels in all"
        _refuse("sample_size", size, f"one or two multiples of {multiple}, up to {MAX_SIDE} and with at most {most}")


# --- tables of the pruned model ----------------------------------------------------------------------------------------


def check_tables(skeleton: UNet2DModel, tables: Mapping[str, object]) -> None:
    """Refuse tables that do not narrow the dense model. Whether the widths fit together is for the pruned model to prove.

    Args:
        skeleton: The dense model, on the meta device.
        tables: `layer_channels`, `norm_group_sizes` and `attention_heads`, by name.

    Raises:
        ValueError: The first entry that is wrong, by name and value.
    """
    modules = dict(skeleton.named_modules())
    weights = (getattr(module, name, None) for module in modules.values() for name in ("weight", "bias"))
    count = sum(tensor.numel() for tensor in weights if tensor is not None)
    if count > MAX_PARAMETERS:
        raise ValueError(f"the config asks for {count:,} parameters, more than {MAX_PARAMETERS:,}")
    for table, entries in tables.items():
        if not isinstance(entries, Mapping) or not all(isinstance(key, str) for key in entries):
            raise ValueError(f"{table} must map module names to numbers, got {type(entries).__name__}")
    layers = tables["layer_channels"]
    for name, channels in layers.items():
        _check_layer(name, modules.get(name), channels)
    for name, sizes in tables["norm_group_sizes"].items():
        _check_norm(name, modules.get(name), sizes)
    for name in tables["attention_heads"]:
        if not isinstance(modules.get(name), Attention):
            raise ValueError(f"attention_heads names {name!r}, which is no attention")
    for name, module in modules.items():
        if isinstance(module, Attention):
            _, inner = layers.get(f"{name}.to_q", (None, module.to_q.out_features))
            _check_heads(name, module, inner, tables["attention_heads"].get(name, module.heads))


def _dense_channels(module: nn.Module | None) -> tuple[int, int] | None:
    """Input and output channels of a layer that the table may narrow."""
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return None


def _check_layer(name: str, module: nn.Module | None, channels) -> None:
    dense = _dense_channels(module)
    if dense is None:
        raise ValueError(f"layer_channels names {name!r}, which is no convolution, linear layer or embedding")
    if not isinstance(channels, (list, tuple)) or len(channels) != 2 or not all(map(_is_int, channels)):
        raise ValueError(f"layer_channels[{name!r}]={channels!r} must be two integers: input and output channels")
    for value, bound in zip(channels, dense):
        if not 1 <= value <= bound:
            raise ValueError(f"layer_channels[{name!r}]={list(channels)} must be from 1 to the dense {list(dense)}")
    fixed = {"conv_in": 0, "conv_out": 1}.get(name, 0 if isinstance(module, nn.Embedding) else None)
    if fixed is not None and channels[fixed] != dense[fixed]:
        raise ValueError(f"layer_channels[{name!r}]={list(channels)} changes {dense[fixed]} channels that are never pruned")


def _check_norm(name: str, module: nn.Module | None, sizes) -> None:
    if not isinstance(module, nn.GroupNorm):
        raise ValueError(f"norm_group_sizes names {name!r}, which is no group norm")
    if not isinstance(sizes, (list, tuple)) or not sizes or not all(map(_is_int, sizes)):
        raise ValueError(f"norm_group_sizes[{name!r}]={sizes!r} must be a list of integers")
    largest = module.num_channels // module.num_groups
    if len(sizes) > module.num_groups or not all(1 <= size <= largest for size in sizes):
        raise ValueError(
            f"norm_group_sizes[{name!r}]={list(sizes)} must be up to {module.num_groups} sizes from 1 to {largest}"
        )


def _check_heads(name: str, attention: Attention, inner: int, heads) -> None:
    """`inner` is the number of channels that the queries have left."""
    if attention.heads < 1:
        raise ValueError(f"attention_head_dim leaves {name} ({attention.query_dim} channels) no head")
    head_dim = attention.inner_dim // attention.heads
    if not _is_int(heads) or not 1 <= heads <= attention.heads or inner % heads or inner // heads > head_dim:
        raise ValueError(
            f"attention_heads[{name!r}]={heads!r} must be from 1 to {attention.heads} and divide {inner} channels "
            f"into heads of at most {head_dim}"
        )
