"""diffusion/flow_matching.py: noise and samples are those of Diffusers' scheduler and pipeline, bit by bit."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMPipeline, FlowMatchEulerDiscreteScheduler

from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.diffusion.schedulers import training_process
from diffusers_gfprune.metrics.quality import SamplingSettings
from diffusers_gfprune.metrics.sampling import denoised, image_generators
from helpers.consistency_models import SIZE, consistency_unet
from helpers.processes import flow_matching


@pytest.mark.parametrize("options", [{}, {"shift": 3.0}, {"stochastic_sampling": True}])
def test_samples_are_those_of_the_stock_pipeline(options: dict) -> None:
    unet, scheduler = consistency_unet(), FlowMatchEulerDiscreteScheduler(**options)
    pipe = DDPMPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    generators = image_generators(3, range(3))
    expected = pipe(3, generator=generators, num_inference_steps=4, output_type="np").images
    (found,) = denoised(unet, scheduler, range(3), (SIZE, SIZE), 4, seed=3)
    assert torch.equal((found / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1), torch.from_numpy(expected))


def test_noise_and_target() -> None:
    """x_t = (1 - sigma) x_0 + sigma eps as the scheduler adds it, and v = eps - x_0, which leads from one to the other."""
    process, scheduler = flow_matching(shift=2.0), FlowMatchEulerDiscreteScheduler(shift=2.0)
    clean, noise, timesteps = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), scheduler.timesteps[[0, 400, 999]]
    noisy = process.add_noise(clean, noise, timesteps)
    torch.testing.assert_close(noisy, scheduler.scale_noise(clean, timesteps, noise))
    target = DiffusionBatch(clean, noise, timesteps).target(process)
    torch.testing.assert_close(noisy - timesteps[:, None, None, None] / 1000 * target, clean, rtol=1e-4, atol=1e-5)


def test_levels_are_uniform_and_shifted() -> None:
    times = torch.tensor([0.0, 0.25, 0.5, 0.999], dtype=torch.float64)
    assert flow_matching().timesteps_at(times).tolist() == pytest.approx([0, 250, 500, 999])
    assert flow_matching(shift=3.0).timesteps_at(times)[2].item() == pytest.approx(750)
    flow_matching().check_timesteps(flow_matching().random_timesteps(100, torch.Generator().manual_seed(0)), 100)
    with pytest.raises(
        ValueError, match="timesteps range from 0 to 1001; they must be .* from 0 to 1000, for a flow-matching"
    ):
        flow_matching().check_timesteps(torch.tensor([0.0, 1001.0]), 2)


def test_settings_of_samples_are_fitted() -> None:
    settings, _ = SamplingSettings().fitted(flow_matching())
    assert (settings.sampler, settings.num_inference_steps, settings.timestep_spacing) == ("Euler's method", 50, None)
    with pytest.raises(ValueError, match="eta=1 must be 0: it is for DDIM, and the model is a flow-matching model"):
        SamplingSettings(eta=1.0).fitted(flow_matching())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting=True of the FlowMatchEulerDiscreteScheduler must be False"),
        ({"invert_sigmas": True}, "invert_sigmas=True of the FlowMatchEulerDiscreteScheduler must be False"),
        ({"shift": 0.0}, "shift=0.0 of the FlowMatchEulerDiscreteScheduler must be greater than 0 and finite"),
    ],
)
def test_configurations_that_are_none_are_refused(options: dict, message: str) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.register_to_config(**options)
    with pytest.raises(ValueError, match=message):
        training_process(scheduler)
