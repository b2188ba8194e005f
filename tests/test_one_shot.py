"""one_shot.py: what does not fit is said before the pruner is made."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_gfprune import PruneDDPMPipeline
from helpers.architectures import build
from helpers.pruners import images

LABELS = torch.arange(8) % 4


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("class-embedding", {}, "the model needs class_labels, but the batch has none"),
        ("class-embedding", {"class_labels": LABELS + 7}, "class_labels range from 7 to 10; with num_class_embeds=10 of the"),
        ("class-embedding", {"class_labels": LABELS.to(torch.uint8)}, "class_labels have dtype torch.uint8; with num_class"),
        ("class-embedding", {"class_labels": LABELS[:3]}, "class_labels has 3 labels for 8 images"),
        ("class-embedding", {"class_labels": LABELS, "null_label": 3}, "class_labels has null_label=3, which no image may"),
        ("class-embedding", {"null_label": 9}, "null_label=9 needs class_labels for the images"),
        ("base", {"class_labels": LABELS}, "the model is unconditional, but the batch has class_labels: leave them out"),
        ("base", {"images": images()[:, :, :4]}, "images have 4x8 pixels, but the model's sample_size is 8x8"),
        ("base", {"images": images() * 3}, "images have values from "),
        ("base", {"batch_size": 0}, "batch_size=0 must be at least 1"),
        ("base", {"recovery": "none"}, "recovery='none' must be True or False"),
        (
            "base",
            {"images": None, "class_labels": LABELS},
            "class_labels must be None with images=None: the model takes no",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(name: str, arguments: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pruner may time layers for minutes."""
    monkeypatch.setattr("diffusers_gfprune.one_shot.GradientFlowPruner", lambda *_, **__: pytest.fail("a pruner is made"))
    pipe = PruneDDPMPipeline(build(name), DDPMScheduler(num_train_timesteps=10))
    with pytest.raises(ValueError, match=f"^{message}"):
        pipe.prune(**{"images": images(), "target": "macs", "ratio": 0.3, **arguments})
