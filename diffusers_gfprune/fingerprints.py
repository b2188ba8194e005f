"""Fingerprints of weights and configurations, for cache keys and results."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["model_fingerprint", "tensors_fingerprint"]

# Entries of a configuration that say where a model came from, not what it computes
_ORIGIN = ("architectures", "dtype", "torch_dtype", "transformers_version")


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of the bytes of tensors, in hexadecimal. It distinguishes models of one architecture."""
    crc = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous().flatten()
        crc = zlib.crc32(tensor.view(torch.uint8).numpy(), zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def model_fingerprint(model: nn.Module) -> dict[str, str]:
    """Class, weights and configuration of a model of Diffusers or Transformers, as JSON values."""
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    values = {name: value for name, value in config.items() if not name.startswith("_") and name not in _ORIGIN}
    text = json.dumps(values, sort_keys=True, default=str)  # lists and tuples are the same
    return {"class": type(model).__name__, "weights": tensors_fingerprint(model.state_dict()), "config": text}
