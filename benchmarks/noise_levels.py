"""Which noise levels move samples, and which make up the loss.

    python benchmarks/noise_levels.py --dataset digits
    python benchmarks/noise_levels.py --dataset cifar10 --dataset_name uoft-cs/cifar10
    python benchmarks/noise_levels.py --write

The model of a data set loses half of its MACs as `prune()` removes them. Samples are then drawn as in the recipe of the data
set, by the dense model, and again with the pruned model at a single step k. With the noisy images x_k of that step,

    error     e_k = mean of (f_pruned(x_k, t_k) - f_dense(x_k, t_k))^2
    change    c_k = mean of (x_0(k) - x_0)^2        x_0: samples of the dense model, x_0(k): with the pruned model at step k

Training weighs all timesteps alike, so that e_k is its share of the loss. c_k / e_k says what an error is worth in samples.

Results are written to `benchmarks/results/noise_levels.json`. `--write` updates the table in `benchmarks/README.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from documents import write_table
from study_settings import BASE, DATASETS
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusers_gfprune.data.batches import calibration_batches
from diffusers_gfprune.data.images import load_images
from diffusers_gfprune.diffusion.batch import ModelInputs
from diffusers_gfprune.diffusion.process import Sampler
from diffusers_gfprune.errors import one_line_errors
from diffusers_gfprune.families.lookup import family_of
from diffusers_gfprune.model_spec import ModelSpec
from diffusers_gfprune.one_shot import prune_unet
from diffusers_gfprune.run_folder import write_json
from diffusers_gfprune.trained_pipelines import load_pipeline
from diffusers_gfprune.training.arguments import parse_arguments

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/noise_levels.json"
RATIO, BATCHES, IMAGES, LEVELS = 0.5, 4, 64, 10

Predict = Callable[[Tensor, Tensor], Tensor]  # from noisy images and a timestep


def prediction_of(unet: nn.Module) -> Predict:
    """Predictions of an unconditional model in evaluation mode."""
    family = family_of(unet.eval())
    return lambda sample, timestep: family.predict(unet, ModelInputs(sample, timestep.expand(len(sample)), {}))


@torch.no_grad()
def step_changes(dense: Predict, pruned: Predict, sampler: Sampler, noise: Tensor, levels: int) -> list[dict]:
    """Errors at some steps of a sampler, and what each alone changes in the samples.

    Args:
        dense: Predictions of the dense model.
        pruned: Predictions of the pruned model.
        sampler: A deterministic sampler without a state.
        noise: Noise that sampling starts from, with shape `(images, channels, height, width)`.
        levels: Number of steps, spread evenly from the first on (>= 1).

    Returns:
        `timestep`, `error` and `change` of each step, as above.
    """
    timesteps, states, predictions = sampler.timesteps, [noise], []
    for timestep in timesteps:
        predictions.append(dense(states[-1], timestep))
        states.append(sampler.step(predictions[-1], timestep, states[-1], []))
    found = []
    for first in tqdm(range(0, len(timesteps), max(1, len(timesteps) // levels)), desc="steps"):
        prediction = pruned(states[first], timesteps[first])
        sample = sampler.step(prediction, timesteps[first], states[first], [])
        for timestep in timesteps[first + 1 :]:
            sample = sampler.step(dense(sample, timestep), timestep, sample, [])
        error, change = (prediction - predictions[first], sample - states[-1])
        squares = {"error": error.square().mean().item(), "change": change.square().mean().item()}
        found.append({"timestep": int(timesteps[first]), **squares})
    return found


def measure(dataset: str, words: list[str], images: int) -> dict:
    """Figures of the model of a data set."""
    args = parse_arguments([*BASE[dataset], *words])
    pipeline = load_pipeline(args.model.pretrained_model_name_or_path, args.model.revision)
    dense, process = pipeline.denoiser, pipeline.process
    training, _ = load_images(args.data, ModelSpec.of(dense, pipeline.codec, pipeline.prompts))
    batches = calibration_batches(training, BATCHES, args.training.train_batch_size, process=process, seed=0, step=0)
    pruned = prune_unet(dense, pipeline.scheduler, torch.cat([batch.clean for batch in batches]), ratio=RATIO)
    steps, spacing = args.evaluation.ddim_num_inference_steps, args.evaluation.timestep_spacing
    steps, spacing, _ = process.fit_sampling(steps, spacing)
    noise = torch.randn(images, *batches[0].clean.shape[1:], generator=torch.Generator().manual_seed(0))
    sampler = process.sampler(steps, spacing)
    rows = step_changes(prediction_of(dense), prediction_of(pruned), sampler, noise, LEVELS)
    return {"images": images, "num_inference_steps": steps, "timestep_spacing": spacing, "rows": rows}


def table(results: dict[str, dict]) -> str:
    """Markdown tables, one for each data set."""
    parts = []
    for dataset, measured in results.items():
        parts.append(f"{dataset}, {measured['num_inference_steps']} steps of DDIM\n")
        parts += ["| timestep | error | change of the samples | change / error |", "|---:|---:|---:|---:|"]
        for row in measured["rows"]:
            error, change = row["error"], row["change"]
            parts.append(f"| {row['timestep']} | {error:.5f} | {change:.6f} | {change / error:.4f} |")
        parts.append("")
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", choices=DATASETS, help="model to measure, by its data set")
    parser.add_argument("--images", type=int, default=IMAGES, help="number of samples (>= 1)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the results")
    parser.add_argument("--write", action="store_true", help="update the tables in benchmarks/README.md")
    options, words = parser.parse_known_args(argv)
    if not options.dataset and not options.write:
        raise ValueError("dataset must be given, or write")
    if options.images < 1:
        raise ValueError(f"images={options.images} must be at least 1")
    results = json.loads(options.results.read_text()) if options.results.is_file() else {}
    if options.dataset:
        results[options.dataset] = measure(options.dataset, words, options.images)
        results = {name: results[name] for name in DATASETS if name in results}
        options.results.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.results, results)
        print(table(results))
    if options.write:
        write_table("noise levels", table(results))


if __name__ == "__main__":
    with one_line_errors("noise_levels.py"):
        main()
