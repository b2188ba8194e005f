"""fingerprints.py: models are told apart by weights and configuration, wherever they came from."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DModel

from diffusers_gfprune.fingerprints import model_fingerprint, tensors_fingerprint
from helpers.architectures import build


def test_fingerprints_tell_weights_apart() -> None:
    weights = {"conv.weight": torch.arange(6.0).view(2, 3), "conv.bias": torch.tensor([1.0, -2.0])}
    other = {**weights, "conv.bias": weights["conv.bias"].flip(0)}
    renamed = {"conv.weight": weights["conv.weight"], "bias": weights["conv.bias"]}
    assert tensors_fingerprint(weights) == tensors_fingerprint(dict(reversed(weights.items())))
    assert len({tensors_fingerprint(weights), tensors_fingerprint(other), tensors_fingerprint(renamed)}) == 3


def test_a_saved_model_keeps_its_fingerprint(tmp_path: Path) -> None:
    model = build("base")
    model.save_pretrained(tmp_path)
    assert model_fingerprint(UNet2DModel.from_pretrained(tmp_path)) == model_fingerprint(model)


def test_fingerprints_tell_configurations_apart() -> None:
    model = build("base")
    before = model_fingerprint(model)
    model.register_to_config(act_fn="gelu")
    after = model_fingerprint(model)
    assert before["weights"] == after["weights"] and before != after
