"""The size of a model: parameters, multiply-accumulates (MACs), bytes of its weights. Speed is in `speed`.

MACs are those of one forward pass at batch size 1: convolutions (output positions x kernel area x input x output channels),
linear layers (tokens x input x output features), and the two matrix products of attention (2 x queries x keys x inner
channels). Norms, activations and additions are not counted, as is usual in this field.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from ..families.lookup import family_of

__all__ = [
    "count_macs",
    "count_parameters",
    "hardware_name",
    "layer_positions",
    "tokens_of_attention",
    "parameter_bytes",
    "spatial_size",
    "trace_forward",
    "weight_file_bytes",
]


# Names of element types in safetensors files
SAFETENSORS_DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"},
}


def spatial_size(unet: object, sample_size: int | tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width in pixels of a model's images.

    Args:
        unet: A model of any family, or its configuration.
        sample_size: Overrides the model's own `sample_size`.

    Raises:
        ValueError: Neither the model nor the argument gives a size.
    """
    size = sample_size if sample_size is not None else getattr(unet, "config", unet).sample_size
    if size is None:
        raise ValueError("the model's config has sample_size=None: pass sample_size, the height and width in pixels")
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def count_parameters(model: nn.Module) -> int:
    """Number of trainable values. Masked values are counted until the model is compacted."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameter_bytes(model: nn.Module) -> int:
    """Size of all parameters in memory, in bytes."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def trace_forward(
    unet: nn.Module,
    sample_size: int | tuple[int, int] | None,
    record: Callable[[str, nn.Module, torch.Tensor | None, object], None],
) -> None:
    """Run a forward pass at batch size 1 on a copy on the meta device, which takes milliseconds for any model size.

    Args:
        unet: A model of any family; only its configuration is read.
        sample_size: Height and width in pixels (default: the model's).
        record: Called after every module with its name, the module, its first positional input, if any, and its output.
    """
    family, (height, width) = family_of(unet), spatial_size(unet, sample_size)
    with torch.device("meta"):
        twin = type(unet).from_config(unet.config).eval()
    for name, module in twin.named_modules():
        if isinstance(module, nn.GroupNorm):  # keeps shapes, and takes half of the time on this device
            module.forward = nn.Identity().forward
        module.register_forward_hook(
            lambda module, inputs, output, name=name: record(name, module, inputs[0] if inputs else None, output)
        )
    with torch.no_grad():
        family.predict(twin, family.example_inputs(twin, height, width, device="meta"))


def layer_positions(unet: nn.Module, sample_size: int | tuple[int, int] | None = None) -> dict[str, int]:
    """Output positions of every convolution and linear layer at batch size 1."""
    positions: dict[str, int] = {}

    def record(name: str, module: nn.Module, x: torch.Tensor | None, output) -> None:
        if isinstance(module, nn.Conv2d):
            number = output.shape[2] * output.shape[3]
        elif isinstance(module, nn.Linear):
            number = output.numel() // output.shape[-1]
        else:
            return
        positions[name] = positions.get(name, 0) + number  # a layer may be called more than once

    trace_forward(unet, sample_size, record)
    return positions


def tokens_of_attention(name: str, positions: Mapping[str, int]) -> tuple[int, int]:
    """Numbers of queries and of keys of an attention at batch size 1, with those of the text in joint attention.

    Args:
        name: Name of the attention.
        positions: Output positions of its layers.
    """
    queries, keys = (
        positions[f"{name}.{layer}"] + positions.get(f"{name}.{added}", 0)
        for layer, added in (("to_q", "add_q_proj"), ("to_k", "add_k_proj"))
    )
    return queries, keys


def count_macs(unet: nn.Module, sample_size: int | tuple[int, int] | None = None) -> int:
    """MACs of one forward pass at batch size 1 (see the module docstring).

    Args:
        unet: A model of any family, dense or pruned.
        sample_size: Height and width in pixels (default: the model's).
    """
    total = 0
    modules, attentions = dict(unet.named_modules()), family_of(unet).attentions(unet)
    positions_of = layer_positions(unet, sample_size)
    for name, positions in positions_of.items():
        total += positions * modules[name].weight.numel()
    for name, attention in attentions.items():
        queries, keys = tokens_of_attention(name, positions_of)
        total += 2 * queries * keys * attention.to_q.out_features
    return total


def hardware_name(device: torch.device) -> str:
    """Name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def weight_file_bytes(unet: nn.Module) -> int:
    """Size of the weights as a safetensors file, in bytes, without making one.

    A file has the length of its header in 8 bytes, the header as JSON, padded to a multiple of 8, and the tensors: those of
    the largest element type first, then by name (format of safetensors 0.8).
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(unet.state_dict().items(), key=lambda item: (-item[1].element_size(), item[0])):
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": SAFETENSORS_DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + end
