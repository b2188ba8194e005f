"""What samples of a latent model of the digits show: the share of right digits, and the distance to real ones.

    python benchmarks/study_digits.py training/digits/dit --output digits.json

The stock pipeline draws samples without guidance, with labels 0 to 9 in turn, or a caption for each. A classifier of the
training digits says which digit they show (`training/digits/check_teachers.py`). FD-digits is the Fréchet distance of samples
and held-out digits, at 8x8 values.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, DiTPipeline, LDMPipeline, ModelMixin, StableDiffusionPipeline

from diffusers_gfprune.errors import one_line_errors
from diffusers_gfprune.families.lookup import family_of
from diffusers_gfprune.run_folder import write_json

__all__ = ["DISTANCE_TITLE", "digit_figures", "script_environment"]

SCRIPTS = Path(__file__).resolve().parent.parent / "training/digits"  # has check_teachers.py
NUM_IMAGES, NUM_INFERENCE_STEPS, LABELS = 500, 25, 10
DISTANCE_TITLE = "FD-digits"


def script_environment() -> dict[str, str]:
    """Environment of a process that can import the scripts beside the models."""
    paths = (str(SCRIPTS), os.environ.get("PYTHONPATH"))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def digit_figures(folder: Path, denoiser: ModelMixin | None = None, num_images: int = NUM_IMAGES) -> dict[str, float]:
    """Figures of a latent pipeline of the digits.

    Args:
        folder: The saved pipeline.
        denoiser: Replaces its denoiser, if given; it need not be of a class that can be saved.
        num_images: Number of samples (>= 2).

    Returns:
        `fd_digits`, and `right_digits` in [0, 1] for models with a condition.
    """
    # Not at the top: benchmarks that import this module run without these scripts
    from check_teachers import accuracy, distance, sampled
    from make_captions import captions_of

    pipeline = DiffusionPipeline.from_pretrained(folder)
    if denoiser is not None:
        pipeline.register_modules(**{family_of(denoiser).component: denoiser})
    labels = torch.arange(num_images) % LABELS
    options: dict[str, object] = {}
    if isinstance(pipeline, DiTPipeline):
        options = {"class_labels": labels.tolist(), "guidance_scale": 1.0}
    elif isinstance(pipeline, StableDiffusionPipeline):
        captions = [captions_of(label) for label in labels.tolist()]
        prompts = [several[index // LABELS % len(several)] for index, several in enumerate(captions)]
        options = {"prompt": prompts, "guidance_scale": 1.0}
    elif not isinstance(pipeline, LDMPipeline):
        raise ValueError(f"folder={folder} has a {type(pipeline).__name__}, not a latent pipeline of the digits")
    with torch.no_grad():
        images = sampled(pipeline, num_images, num_inference_steps=NUM_INFERENCE_STEPS, **options)
    figures = {"fd_digits": distance(images)}
    return {**figures, "right_digits": accuracy(images, labels)} if options else figures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a saved pipeline")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the figures")
    parser.add_argument("--num_images", type=int, default=NUM_IMAGES, help="number of samples (>= 2)")
    args = parser.parse_args(argv)
    if args.num_images < 2:
        raise ValueError(f"num_images={args.num_images} must be at least 2")
    complete = args.output.with_suffix(".tmp")
    write_json(complete, digit_figures(args.folder, num_images=args.num_images))
    os.replace(complete, args.output)


if __name__ == "__main__":
    with one_line_errors("study_digits.py"):
        main()
