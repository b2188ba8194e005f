"""Measure a diffusion model, dense or pruned: distances to real images, similarity to the dense model, step loss, cost.

    accelerate launch training/evaluate.py --model runs/cifar10 --reference_model google/ddpm-cifar10-32 \
        --dataset_name uoft-cs/cifar10 --num_images 50000 --timestep_spacing quadratic
    accelerate launch training/evaluate.py --compare runs/a-evaluation runs/b-evaluation

Writes `results.json`, pictures and a table into `--output_dir`. The processes divide samples and features into shards, which
are cached. After an interruption the same command resumes; later evaluations with the same dense model or data reuse them.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_gfprune.errors import one_line_errors
from diffusers_gfprune.evaluation.arguments import EvaluateArguments, parse_evaluate_arguments
from diffusers_gfprune.evaluation.card import check_run, updated_run
from diffusers_gfprune.evaluation.comparisons import (
    common_reference,
    comparison_table,
    differing_machines,
    differing_settings,
    reference_title,
)
from diffusers_gfprune.evaluation.figures import describe_evaluation, describe_model, describe_plan, warn_of_few
from diffusers_gfprune.evaluation.inputs import Inputs, load_inputs
from diffusers_gfprune.evaluation.processes import ERRORS, PROGRAM, main_first, make_accelerator, together
from diffusers_gfprune.evaluation.sample_quality import RealFeatures
from diffusers_gfprune.evaluation.samples import Samples, folder_source, model_source, shards
from diffusers_gfprune.evaluation.trials import try_features
from diffusers_gfprune.interruption import Interruption, StoppedBySignal
from diffusers_gfprune.metrics.cache import TensorCache, default_cache_dir
from diffusers_gfprune.metrics.conditions import SampleConditions
from diffusers_gfprune.metrics.quality import Quality
from diffusers_gfprune.metrics.speed import measure_speed
from diffusers_gfprune.reports.plots import plot_step_loss, save_sample_grid, save_sample_rows
from diffusers_gfprune.reports.provenance import command_line, portable
from diffusers_gfprune.reports.results import EVALUATION, ModelFigures, Results, read_results
from diffusers_gfprune.run_folder import RunFolder, write_json

SAMPLES_FILE = "samples.safetensors"
# All files that an evaluation or a comparison writes
FILES = {"results.json", "samples.png", "step_loss.png", "table.md", "comparison.png", SAMPLES_FILE}


def main(argv: list[str] | None = None) -> None:
    """Run an evaluation or a comparison."""
    interruption = Interruption()  # made first, to know the launcher
    args = parse_evaluate_arguments(argv)
    cache_dir = Path(args.output.evaluation_cache_dir or default_cache_dir())
    folder = RunFolder(args.output_dir, args.output.overwrite_output_dir, args.inputs, marker=None)
    accelerator = make_accelerator(mixed_precision="no")
    main_process = accelerator.is_main_process
    share = (accelerator.process_index, accelerator.num_processes)
    with together(accelerator):
        folder.check_outside(encoding_cache_dir=args.data.encoding_cache_dir)
        if main_process and not args.output.dry_run:
            check_folders(folder, None if args.model.compare else cache_dir)
        if main_process and args.model.compare:
            compare(args, folder)
    if args.model.compare:
        accelerator.end_training()
        return

    # 1. models, data, networks: all inputs are checked here
    inputs = main_first(accelerator, lambda: load_inputs(args, accelerator.device))
    if not args.output.dry_run:
        inputs.images.prepare_held_out(accelerator.device)  # latents and captions are encoded, if the model takes them
    cache = TensorCache(cache_dir)
    samples = make_samples(inputs, cache, prepared=not args.output.dry_run)
    real = RealFeatures(
        inputs.images,
        inputs.networks,
        cache,
        args.samples.num_reference_images or inputs.images.num_images,
        args.data.max_broken_images,
    )
    with together(accelerator):
        if main_process:
            if args.output.update_model_card:
                check_run(Path(args.model.model), inputs)
            print(describe_plan(args, inputs, samples, real, share[1]), flush=True)
            for change in inputs.changes:
                print(f"warning: {change}", file=sys.stderr)
            try_features(inputs.networks, inputs.images.decoder.shape)
            warn_of_few(inputs, real)
    if args.output.dry_run:
        accelerator.end_training()
        return

    with folder if main_process else nullcontext():
        # 2. samples and features, divided among processes
        figures = []
        if main_process:
            folder.prepare()
            figures = [describe_model(args, argument, inputs) for argument in inputs.models]
        with tqdm(
            total=samples.work(*share) + real.work(*share),
            desc="samples and features",
            unit="image",
            disable=not main_process,
        ) as bar:

            def advance(count: int) -> None:
                bar.update(count)
                if interruption.signal is not None:  # only the end of the launcher: signals to this process stop it at once
                    raise StoppedBySignal(interruption.signal)

            real.make(*share, advance)  # first, to report errors in real images early
            samples.make(*share, advance)
        # A failed process has printed its error and exited; the launcher ends the processes that wait here.
        accelerator.wait_for_everyone()
        accelerator.end_training()
        if not main_process:
            return

        # 3. figures; 4. files, pictures, table
        results = measure(args, accelerator, inputs, samples, real, figures)
        table = write_files(folder.staging, results, samples)
        update = nullcontext()
        if args.output.update_model_card:
            update = updated_run(Path(args.model.model), results, folder.staging / "samples.png")
        with update:
            folder.publish()  # last, so that the same command can repeat an interrupted update
    samples.forget_images()
    print(f"\n{table}\n\nsaved: {folder.path}")


def check_folders(folder: RunFolder, cache_dir: Path | None) -> None:
    """Check that the output folder holds no other files and that the cache is writable.

    Raises:
        ValueError: The output folder holds other files, or a folder cannot be written.
    """
    folder.check_not_training()
    folder.check()
    if folder.overwrite and folder.path.exists():
        foreign = (
            sorted(path.name for path in folder.path.iterdir() if path.name not in FILES) if folder.path.is_dir() else ["it"]
        )
        if foreign:
            raise ValueError(f"output_dir={folder.path} is not an evaluation, it holds {foreign[0]}: choose another folder")
    if cache_dir is None:
        return
    folder.check_outside(evaluation_cache_dir=cache_dir)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        (cache_dir / ".writable").touch()
        (cache_dir / ".writable").unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"evaluation_cache_dir={cache_dir} cannot be written: {error.strerror}") from error


def make_samples(inputs: Inputs, cache: TensorCache, prepared: bool) -> Samples:
    """Create the sources of samples, without sampling.

    Args:
        inputs: Inputs of the evaluation.
        cache: Cache of samples and features.
        prepared: Whether captions are encoded. Samples of prompts that are not are not looked up in the cache.
    """
    if inputs.folder_images is not None:
        sources = [folder_source("images", inputs.folder_images, cache)]
    else:
        known = prepared or inputs.models["model"].prompts is None
        conditions = inputs.conditions if known else SampleConditions()
        sources = [
            model_source(name, model.denoiser, model.scheduler, inputs.settings, cache, model.codec, conditions)
            for name, model in inputs.models.items()
        ]
    return Samples(sources, inputs.networks, shards(inputs.num_images, inputs.images.decoder.shape))


def measure(
    args: EvaluateArguments,
    accelerator: Accelerator,
    inputs: Inputs,
    samples: Samples,
    real: RealFeatures,
    figures: list[ModelFigures],
) -> Results:
    """Compute all results from the samples and features.

    Args:
        args: Command-line arguments.
        accelerator: Accelerator of this process.
        inputs: Inputs of the evaluation.
        samples: Computed samples.
        real: Computed features of real images.
        figures: Figures of the models that need no samples; the others are added here.
    """
    if accelerator.num_processes > 1 and any(samples.unsampled()):
        folder = samples.sources[0].cache.folder
        print(f"warning: samples of other processes are not in {folder} and are drawn again", file=sys.stderr)
    if inputs.folder_images is not None:
        figures = [ModelFigures(name=str(portable(args.model.images_dir)))]
    quality = Quality(inputs.settings, inputs.networks, real.features(), kernel=True)
    if samples.spans:
        for measured, source in zip(figures, samples.sources):
            measured.quality |= quality.distances(samples.features(source))
        figures[0].quality |= samples.similarities()
    if inputs.models and args.cost.speed_settings():
        # Speed-ups are relative to the first model, so the dense model comes first
        unets = {name: pipeline.denoiser for name, pipeline in reversed(inputs.models.items())}
        for entry in measure_speed(unets, args.cost.speed_settings(), progress="speed"):
            figures[list(inputs.models).index(entry.pop("model"))].speed.append(entry)
    return Results(
        EVALUATION,
        model=figures[0],
        reference_model=figures[1] if len(figures) > 1 else None,
        evaluation=describe_evaluation(args, inputs, real, quality, accelerator),
        command=command_line(args.words, "training/evaluate.py"),
    )


def write_files(folder: Path, results: Results, samples: Samples) -> str:
    """Write results, pictures and the table; return the table."""
    write_json(folder / "results.json", results.to_dict())
    shown = samples.shown()
    if shown:
        save_file(shown, folder / SAMPLES_FILE)
        pictures = {name: images.float() / 255 for name, images in shown.items()}
        if len(pictures) == 2:
            save_sample_grid(folder / "samples.png", pictures["reference_model"], pictures["model"])
        else:
            save_sample_rows(folder / "samples.png", list(pictures.values()))
    models = {results.model.name: results.model}
    if results.reference_model is not None:
        models[reference_title(results.reference_model)] = results.reference_model
    if results.model.step_loss_by_timestep:
        plot_step_loss(folder / "step_loss.png", {title: m.step_loss_by_timestep for title, m in models.items()})
    table = comparison_table([results])
    (folder / "table.md").write_text(table + "\n", "utf-8")
    return table


def compare(args: EvaluateArguments, folder: RunFolder) -> None:
    """Write a table of earlier evaluations, and a picture of their samples.

    Raises:
        ValueError: An evaluation is missing or damaged, or their settings differ.
    """
    results = [read_evaluation(name) for name in args.model.compare]
    differing = differing_settings(results)
    if differing:
        raise ValueError(f"compare={' '.join(args.model.compare)} cannot be compared, they differ in {'; '.join(differing)}")
    table = comparison_table(results)
    for name, values in differing_machines(results).items():
        print(f"warning: {name} differs: {', '.join(map(str, values))}", file=sys.stderr)
    rows = sample_rows(args.model.compare, results)
    with folder:
        folder.prepare()
        if rows:
            titles, images = zip(*rows)
            save_sample_rows(folder.staging / "comparison.png", images, titles)
        (folder.staging / "table.md").write_text(table + "\n", "utf-8")
        folder.publish()
    print(f"{table}\n\nsaved: {folder.path}")


def read_evaluation(name: str) -> Results:
    """Results in a folder given by `--compare`.

    Raises:
        ValueError: There are none, they cannot be read, or they are those of a pruning run.
    """
    if not (Path(name) / "results.json").exists():
        raise ValueError(f"compare={name} holds no results.json: run evaluate.py on the model first")
    results = read_results(name)
    if results.kind != EVALUATION:
        raise ValueError(f"compare={name} holds results of a {results.kind}: run evaluate.py on the model first")
    return results


def sample_rows(names: Sequence[str], results: Sequence[Results]) -> list[tuple[str, Tensor]]:
    """Titles and samples in [0, 1] of the evaluations that saved samples, the common reference model first."""
    rows, reference = [], common_reference(results)
    for name, result in zip(names, results):
        path = Path(name) / SAMPLES_FILE
        if not path.is_file():
            continue
        try:
            samples = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if reference is not None and not rows and "reference_model" in samples:
            rows.append((reference_title(reference), samples["reference_model"].float() / 255))
        for key in ("model", "images"):
            if key in samples:
                rows.append((result.model.name, samples[key].float() / 255))
    return rows


def stop(number: int, frame: object) -> None:
    """Exit on a signal, so that context managers remove incomplete files."""
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    try:
        with one_line_errors(PROGRAM, ERRORS):
            main()
    except KeyboardInterrupt:
        print(f"{PROGRAM}: stopped; the same command resumes the evaluation", file=sys.stderr)
        sys.exit(130)
