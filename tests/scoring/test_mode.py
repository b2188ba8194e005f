"""Scores use float32 arithmetic and the plain model, however it is trained; all settings are restored."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from diffusers_gfprune.configuration import GFPruneConfig
from diffusers_gfprune.one_shot import calibration_batches
from diffusers_gfprune.pruning.channel_groups import trace_channel_groups
from diffusers_gfprune.scoring.importance import score_units
from diffusers_gfprune.scoring.mode import scoring_mode
from helpers.architectures import build

GROUPS = trace_channel_groups(build("fine-units"))
SCHEDULER = DDPMScheduler()
IMAGES = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
FORMS = {
    "predictions": {"criterion": "gradient-flow"},
    "exact": {"criterion": "gradient-flow-weights", "hvp": "exact"},
    "finite-difference": {"criterion": "gradient-flow-weights", "hvp": "finite-difference"},
}


def scores(unet: UNet2DModel, images: Tensor = IMAGES, **options) -> dict[str, Tensor]:
    """Scores on one batch."""
    batches = calibration_batches(images, SCHEDULER)
    return score_units(unet, GROUPS, batches, SCHEDULER, GFPruneConfig(**options))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """The same to rounding, relative to the largest score of the group."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=tolerance * values.abs().max().item())


# --- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_autocast_does_not_reach_scores(form: str):
    """Neither a surrounding one, nor the one that Accelerate puts around the forward of the model itself."""
    unet = build("fine-units")
    expected = scores(unet, **FORMS[form])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(scores(unet, **FORMS[form]), expected, tolerance=0)
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(unet)
    wrapped = vars(unet)["forward"]
    assert prepared is unet  # in place: other references see the wrapped model, too
    assert_close(scores(unet, **FORMS[form]), expected, tolerance=0)
    assert vars(unet)["forward"] is wrapped


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_scored_in_full_precision(form: str, dtype: torch.dtype):
    """The scores are those of the rounded weights, to float32 rounding; the model is left in half precision."""
    unet = build("fine-units").to(dtype)
    weights = {name: weight.clone() for name, weight in unet.state_dict().items()}
    expected = scores(copy.deepcopy(unet).float(), **FORMS[form])
    assert_close(scores(unet, **FORMS[form]), expected, tolerance=0)
    for name, weight in unet.state_dict().items():
        assert weight.dtype == dtype and torch.equal(weight, weights[name])


# --- how the model runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_gradient_checkpointing_changes_no_score(form: str):
    """A model that is short of memory is ranked as any other."""
    unet = build("fine-units")
    expected = scores(unet, **FORMS[form])
    unet.enable_gradient_checkpointing()
    assert_close(scores(unet, **FORMS[form]), expected)
    assert unet.is_gradient_checkpointing


@pytest.mark.parametrize(("differentiate", "checkpointed"), [(1, True), (2, False)])
def test_checkpointing_is_off_only_where_it_would_save_nothing(differentiate: int, checkpointed: bool):
    """A graph to be differentiated twice keeps all activations; first derivatives still go without them."""
    unet = build("fine-units")
    unet.enable_gradient_checkpointing()
    with pytest.raises(KeyError, match="on purpose"), scoring_mode(unet, [], differentiate=differentiate):
        assert unet.is_gradient_checkpointing == checkpointed
        raise KeyError("on purpose")
    blocks = [block for block in unet.modules() if hasattr(block, "gradient_checkpointing")]
    assert blocks and all(block.gradient_checkpointing for block in blocks)


@pytest.mark.parametrize("form", FORMS)
def test_memory_format_changes_no_score(form: str):
    """Channels-last weights and images; weights stay so."""
    unet = build("fine-units")
    expected = scores(unet, **FORMS[form])
    unet.to(memory_format=torch.channels_last)
    images = IMAGES.contiguous(memory_format=torch.channels_last)
    assert_close(scores(unet, images, **FORMS[form]), expected, tolerance=2e-3)
    assert unet.mid_block.resnets[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_model_is_scored_eagerly(form: str):
    """Compiled graphs have no second derivative."""
    unet = build("fine-units")
    expected = scores(unet, **FORMS[form])
    unet.mid_block.compile(backend="aot_eager")
    sample, steps = torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64)
    unet(sample, steps).sample.sum().backward()  # compiles
    assert_close(scores(unet, **FORMS[form]), expected, tolerance=0)
