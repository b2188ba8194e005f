"""Print what the latent digits models can do: sizes, reconstruction, right digits, distance to real digits.

    python training/digits/check_teachers.py                       # the models that ship here (a minute on one core)
    python training/digits/check_teachers.py --dit runs/digits-dit --pictures_dir runs/pictures

Samples are averaged over blocks of 4x4 pixels and all channels. A support vector classifier, which saw the 1,500 training
digits enlarged and reduced in the same way, says which digit they show. FD is the Fréchet distance of these 64 values to those
of the 297 held-out digits; the training digits have one, too, and so have samples of noise.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, DiTPipeline, LDMPipeline, StableDiffusionPipeline, VQModel
from latent_training import FOLDER, load_digits
from make_captions import captions_of
from sklearn.svm import SVC
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import HfArgumentParser

from diffusers_gfprune.argument_fields import argument, at_least, check_fields
from diffusers_gfprune.errors import one_line_errors
from diffusers_gfprune.families.lookup import family_of
from diffusers_gfprune.metrics.fidelity import frechet_distance, psnr
from diffusers_gfprune.metrics.model_size import count_macs, count_parameters
from diffusers_gfprune.reports.plots import save_sample_rows

LABELS = 10


@dataclass
class CheckArguments:
    """Models and samples."""

    dit: str = argument(str(FOLDER / "dit"), "Folder of the `DiTPipeline`.")
    ldm: str = argument(str(FOLDER / "ldm"), "Folder of the `LDMPipeline`.")
    text: str = argument(str(FOLDER / "text"), "Folder of the `StableDiffusionPipeline`.")
    num_images: int = argument(500, "Number of samples for each setting (>= 10).")
    num_inference_steps: int = argument(25, "DDIM steps (>= 1).")
    pictures_dir: str | None = argument(None, "Folder for grids of samples as PNG files (default: none).")
    num_threads: int = argument(1, "Threads of the CPU (>= 1).")

    def __post_init__(self) -> None:
        check_fields(self, at_least(10), "num_images")
        check_fields(self, at_least(1), "num_inference_steps", "num_threads")


def reduced(images: Tensor) -> np.ndarray:
    """Images of digits with 8x8 values, as the classifier reads them.

    Args:
        images: `(N, 3, 32, 32)` in [-1, 1].

    Returns:
        float64 with shape `(N, 64)` in [0, 1].
    """
    grey = torch.nn.functional.avg_pool2d(images.double().mean(dim=1, keepdim=True), 4)
    return ((grey + 1) / 2).clamp(0, 1).flatten(1).numpy()


@functools.cache
def classifier() -> SVC:
    """Tells digits apart, trained on the training digits."""
    digits = load_digits("train")
    return SVC(C=10.0, gamma="scale").fit(reduced(digits.images), digits.labels.numpy())


def accuracy(images: Tensor, labels: Tensor) -> float:
    """Share of images that show the digits of the labels, in [0, 1]."""
    return float((classifier().predict(reduced(images)) == labels.numpy()).mean())


def sampled(pipeline: DiffusionPipeline, count: int, seed: int = 0, batch_size: int = 100, **options) -> Tensor:
    """Samples of a pipeline.

    Args:
        pipeline: One of the three.
        count: Number of images.
        seed: Of the first batch; each batch has its own.
        batch_size: Images of one call.
        options: Arguments of the call. Lists have one entry for each image.

    Returns:
        float32 with shape `(count, 3, 32, 32)` in [-1, 1].
    """
    pipeline.set_progress_bar_config(disable=True)
    parts = []
    for start in range(0, count, batch_size):
        rows = slice(start, min(start + batch_size, count))
        now = {name: value[rows] if isinstance(value, list) else value for name, value in options.items()}
        if isinstance(pipeline, LDMPipeline):
            now["batch_size"] = rows.stop - rows.start
        generator = torch.Generator().manual_seed(seed + start)
        images = pipeline(**now, generator=generator, output_type="np").images
        parts.append(torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1)
    return torch.cat(parts)


def use_null_label(pipeline: DiTPipeline) -> RemovableHandle:
    """Let guidance work for any number of classes. For it, `DiTPipeline` (Diffusers 0.42.1) asks for label 1000, the null
    label of ImageNet.

    Returns:
        A handle whose `remove` undoes this.
    """

    def replace(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        labels = kwargs["class_labels"].clamp(max=module.config.num_embeds_ada_norm)
        return args, {**kwargs, "class_labels": labels}

    return pipeline.transformer.register_forward_pre_hook(replace, with_kwargs=True)


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL | VQModel, images: Tensor) -> float:
    """PSNR in decibels of the mean squared error over all images, decoded from the means of their posteriors."""
    encoded = vae.encode(images)
    latents = encoded.latents if isinstance(vae, VQModel) else encoded.latent_dist.mean
    return psnr(((vae.decode(latents).sample.clamp(-1, 1) - images) / 2).square().mean().item())


def distance(images: Tensor) -> float:
    """Fréchet distance of digits to the held-out ones."""
    features, reference = (torch.from_numpy(reduced(part)) for part in (images, load_digits("validation").images))
    return frechet_distance(features, reference)


def cost_line(pipeline: DiffusionPipeline) -> str:
    """Parameters, MACs, and time of a forward pass at batch 16 (the fastest of ten)."""
    model = pipeline.transformer if isinstance(pipeline, DiTPipeline) else pipeline.unet
    family, size, times = family_of(model), model.config.sample_size, []
    inputs = family.example_inputs(model, size, size, batch_size=16)
    with torch.no_grad():
        for _ in range(10):
            start = time.perf_counter()
            family.predict(model, inputs)
            times.append(time.perf_counter() - start)
    cost = f"{count_parameters(model) / 1e6:.3f}M parameters, {count_macs(model) / 1e6:.1f}M MACs"
    return f"{cost}, {1000 * min(times):.1f} ms for a batch of 16"


def main() -> None:
    args = HfArgumentParser(CheckArguments, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()[0]
    torch.set_num_threads(args.num_threads)
    dit = DiTPipeline.from_pretrained(args.dit)
    ldm = LDMPipeline.from_pretrained(args.ldm)
    text = StableDiffusionPipeline.from_pretrained(args.text)
    use_null_label(dit)
    held_out, train = load_digits("validation"), load_digits("train")
    labels = torch.arange(args.num_images) % LABELS
    prompts = [captions_of(label)[index // LABELS % len(captions_of(label))] for index, label in enumerate(labels.tolist())]
    common = {"count": args.num_images, "num_inference_steps": args.num_inference_steps}

    def report(name: str, images: Tensor, wanted: Tensor | None = None) -> None:
        right = "" if wanted is None else f"{accuracy(images, wanted):.1%} right, "
        print(f"{name}: {right}FD {distance(images):.3f}", flush=True)
        if args.pictures_dir is not None:
            path = Path(args.pictures_dir) / f"{name.replace(' ', '-')}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_sample_rows(path, ((images[:100] + 1) / 2).split(10), columns=10)

    report("held-out digits", held_out.images, held_out.labels)
    report("training digits", train.images, train.labels)
    for name, pipeline in (("dit", dit), ("ldm", ldm), ("text", text)):
        print(f"{name}: {cost_line(pipeline)}")
    for name, vae in (("AutoencoderKL", dit.vae), ("VQModel", ldm.vqvae)):
        print(f"{name}: {reconstruction_psnr(vae, held_out.images):.1f} dB PSNR, scaling_factor {vae.config.scaling_factor}")
    for guidance in (1.0, 2.0):
        images = sampled(dit, class_labels=labels.tolist(), guidance_scale=guidance, **common)
        report(f"dit guidance {guidance:g}", images, labels)
    report("ldm", sampled(ldm, **common))
    for guidance in (1.0, 2.0):
        images = sampled(text, prompt=prompts, guidance_scale=guidance, **common)
        report(f"text guidance {guidance:g}", images, labels)


if __name__ == "__main__":
    with one_line_errors("check_teachers.py"):
        main()
