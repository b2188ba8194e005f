"""metrics/model_size.py: spatial sizes, and the size of a weight file, without making one.

MACs are in tests of the cost model.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import save_file
from torch import nn

from diffusers_gfprune.metrics.model_size import count_macs, spatial_size, weight_file_bytes
from helpers.architectures import build


class Mixed(nn.Module):
    """Tensors of several types, and names that JSON escapes."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, 5, dtype=torch.bfloat16))
        self.b = nn.Parameter(torch.zeros(1234))
        for number, dtype in enumerate((torch.int64, torch.float16, torch.uint8, torch.bool, torch.float64, torch.int32)):
            self.register_buffer(f"steps_{number}", torch.zeros(number + 1, dtype=dtype))
        self.layers = nn.ModuleDict({'a "quoted" µ': nn.Linear(2, 2)})


@pytest.mark.parametrize("model", [build("base"), build("base").half(), Mixed()], ids=["float32", "float16", "mixed"])
def test_the_size_is_that_of_the_file(model: nn.Module, tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert weight_file_bytes(model) == (tmp_path / "model.safetensors").stat().st_size


def test_a_model_on_the_meta_device_has_a_size() -> None:
    """Nothing is copied."""
    assert weight_file_bytes(build("base").to("meta")) == weight_file_bytes(build("base"))


def test_spatial_size_is_that_of_the_model_or_the_argument() -> None:
    """One number means a square; an argument wins over the model."""
    assert spatial_size(build("base")) == (8, 8)
    assert spatial_size(build("non-square")) == (8, 16)
    assert spatial_size(build("base"), 16) == (16, 16)
    assert spatial_size(build("non-square"), (32, 24)) == (32, 24)


def test_unknown_spatial_size_is_refused() -> None:
    """Without a size there are no MACs; guessing one would give a wrong figure."""
    unet = build("base")
    sizeless = UNet2DModel.from_config({**unet.config, "sample_size": None})
    for measure in (spatial_size, count_macs):
        with pytest.raises(ValueError, match="sample_size=None: pass sample_size"):
            measure(sizeless)
    assert count_macs(sizeless, 8) == count_macs(unet)


def test_counting_leaves_the_model_alone() -> None:
    """Counting hooks are attached to a copy without memory."""
    unet = build("base")
    assert count_macs(unet) > 0
    assert not any(module._forward_hooks for module in unet.modules())
    assert next(unet.parameters()).device.type == "cpu"
