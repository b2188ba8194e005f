"""metrics/quality.py: settings, and measurements combined from parts that are tested separately."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from diffusers_gfprune.metrics.features import feature_network
from diffusers_gfprune.metrics.fidelity import (
    frechet_distance,
    frechet_distance_pixels,
    kernel_distance,
    psnr_to_reference,
    ssim_to_reference,
)
from diffusers_gfprune.metrics.quality import Quality, SamplingSettings, extract_features, kernel_metric
from helpers.architectures import build


class Means:
    """Features: the means of four quarters of an image."""

    name, metric, title, description, dimensions = "means", "fd_means", "FD-means", "means of quarters", 4

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        quarters = torch.nn.functional.avg_pool2d(images.float().mean(dim=1, keepdim=True) / 255, images.shape[-1] // 2)
        return quarters.flatten(1)


def images(count: int = 100, seed: int = 0, side: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(count, 3, side, side, generator=generator) * 255).round() / 255


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 0}, "num_images=0 must be at least 1"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be at least 1"),
        ({"batch_size": -1}, "batch_size=-1 must be at least 1"),
        ({"timestep_spacing": "cubic"}, "timestep_spacing=cubic must be one of leading"),
        ({"eta": -0.1}, r"eta=-0.1 must be in \[0, 1\]"),
        ({"eta": float("nan")}, "eta=nan must be in"),
        ({"seed": -1}, "seed=-1 must not be negative"),
    ],
)
def test_settings_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**options)


def test_identity_is_what_samples_depend_on() -> None:
    assert SamplingSettings(batch_size=3).identity() == SamplingSettings(batch_size=5).identity()
    assert SamplingSettings(10, 4, "quadratic", 0.5, 3).identity() == {
        "sampler": "DDIM",
        "num_images": 10,
        "num_inference_steps": 4,
        "timestep_spacing": "quadratic",
        "eta": 0.5,
        "seed": 3,
    }


def test_part_of_the_samples_is_part_of_them() -> None:
    """With the classes in turn, whatever the first number is."""
    unet, scheduler = build("class-embedding"), DDPMScheduler()
    settings = SamplingSettings(7, 2, eta=0.5)
    whole = settings.sample(unet, scheduler)
    assert whole.shape == (7, 1, 8, 8)
    torch.testing.assert_close(settings.sample(unet, scheduler, first=3, count=2), whole[3:5], rtol=0, atol=1.001 / 255)
    torch.testing.assert_close(settings.sample(unet, scheduler, first=5), whole[5:], rtol=0, atol=1.001 / 255)


def test_features_are_taken_of_8_bits_in_batches() -> None:
    network, told = Means(), []
    found = extract_features(network, images(10) + 0.001, 4, told.append)
    assert told == [4, 4, 2] and [batch.dtype for batch in network.seen] == [torch.uint8] * 3
    assert torch.equal(found, extract_features(Means(), (images(10) * 255).round().to(torch.uint8)))
    assert found.shape == (10, 4)


def test_names_of_kernel_distances() -> None:
    assert [kernel_metric(name) for name in ("fid", "fd_dinov2", "fd_pixels")] == ["kid", "kd_dinov2", "kd_pixels"]


def test_distances_are_those_of_the_features() -> None:
    networks = [Means(), feature_network("pixels")]
    generated, real = images(250), images(220, seed=1) * 0.9
    reference = {network.name: extract_features(network, real) for network in networks}
    found = Quality(SamplingSettings(), networks, reference, kernel=True).measure(generated)
    means = extract_features(Means(), generated)
    assert found == {
        "fd_means": frechet_distance(means, reference["means"]),
        "kd_means": kernel_distance(means, reference["means"]),
        "fd_pixels": frechet_distance_pixels(generated, reference["pixels"]),
        "kd_pixels": kernel_distance(generated.flatten(1), reference["pixels"]),
    }
    assert set(Quality(SamplingSettings(), networks, reference).measure(generated)) == {"fd_means", "fd_pixels"}


def test_similarities_are_to_the_dense_samples() -> None:
    """SSIM takes seven pixels; equal images have no PSNR."""
    dense, generated = images(5), images(5, seed=1)
    quality = Quality(SamplingSettings(5), dense_samples=dense)
    found = quality.measure(generated)
    assert found["psnr_to_dense"] == pytest.approx(psnr_to_reference(generated, dense))
    assert found["ssim_to_dense"] == pytest.approx(ssim_to_reference(generated, dense))
    assert quality.measure(dense) == {"psnr_to_dense": None, "ssim_to_dense": pytest.approx(1)}
    assert quality.similarities(generated[:2])["psnr_to_dense"] == pytest.approx(psnr_to_reference(generated[:2], dense[:2]))
    small = Quality(SamplingSettings(5), dense_samples=images(5, side=6))
    assert set(small.measure(images(5, seed=1, side=6))) == {"psnr_to_dense"}
    assert Quality(SamplingSettings(5)).measure(generated) == {}


def test_dense_samples_are_measured_like_others() -> None:
    network = Means()
    quality = Quality(SamplingSettings(), [network], {"means": extract_features(network, images(50))}, images(50, seed=1))
    assert quality.measure_dense() == {"fd_means": quality.measure(images(50, seed=1))["fd_means"]}


def test_description_says_what_distances_are_of() -> None:
    quality = Quality(SamplingSettings(), [Means()], {"means": torch.zeros(12, 4)})
    described = {"title": "FD-means", "features": "means of quarters", "reference_images": 12}
    assert quality.describe() == {"fd_means": described}
    with_kernel = Quality(SamplingSettings(), [Means()], {"means": torch.zeros(12, 4)}, kernel=True).describe()
    subsets = {"num_subsets": 100, "subset_size": 1000, "seed": 0}
    assert with_kernel == {"fd_means": described, "kd_means": {**described, "title": "KD-means", **subsets}}
    inception = Means()
    inception.metric, inception.title = "fid", "FID"
    titles = {
        name: entry["title"] for name, entry in Quality(None, [inception], {"means": [0]}, kernel=True).describe().items()
    }
    assert titles == {"fid": "FID", "kid": "KID"}
