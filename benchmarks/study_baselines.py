"""Baselines of the study that `prune_ddpm.py` does not provide: scratch, Torch-Pruning, and blocks chosen by hand.

    python benchmarks/study_baselines.py --baseline torch-pruning --results DIR --recipe digits --seed 0 --output_dir DIR

- `scratch`: random weights in the widths that the setting two-phase chose with the same seed, from its results in `--results`.
- `torch-pruning`: Torch-Pruning's pruner with the settings of Diff-Pruning's `ddpm_prune.py` (Fang et al., arXiv 2305.10924):
  gradients summed over the timesteps in order until the loss falls below a twentieth of the largest, Taylor importance of
  single weights, one uniform pruning ratio for all layers, attention by heads, output convolution not pruned, attributes of
  samplers corrected. The ratio is the one whose MACs are nearest to the budget. In transformers, only layers inside of blocks
  are pruned: the hidden size stays, as everywhere in this study.
- `by-hand`: whole blocks, chosen by hand (`blocks_by_hand.py`).

All the rest is the same as in a pruning run: images, order, noise, loss, optimizer, schedule, average, evaluation. The
arguments are those of `prune_ddpm.py`.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch_pruning as tp
from accelerate import Accelerator
from blocks_by_hand import remove_by_hand
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from diffusers.training_utils import EMAModel
from study_digits import digit_figures
from torch import nn
from tqdm.auto import tqdm

from diffusers_gfprune import GFPruneConfig, GFPrunedUNet2DModel, GradientFlowPruner
from diffusers_gfprune.data.batches import calibration_batches, train_dataloader
from diffusers_gfprune.data.images import load_images
from diffusers_gfprune.data.sources import ImageSource
from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.errors import one_line_errors
from diffusers_gfprune.evaluation.sample_quality import SampleQuality
from diffusers_gfprune.families.lookup import family_of
from diffusers_gfprune.metrics.model_size import count_macs, count_parameters, spatial_size
from diffusers_gfprune.metrics.step_loss import StepLoss
from diffusers_gfprune.model_spec import ModelSpec
from diffusers_gfprune.objectives.objective import NoisePrediction, Objective
from diffusers_gfprune.pruning.budget import select_units, width_ladder
from diffusers_gfprune.reports.provenance import command_line
from diffusers_gfprune.run_folder import write_json
from diffusers_gfprune.trained_pipelines import TrainedPipeline, load_pipeline
from diffusers_gfprune.training.arguments import Arguments, parse_arguments
from diffusers_gfprune.training.reporting import measure_step_losses, results
from diffusers_gfprune.training.state import make_lr_scheduler, seed_everything
from diffusers_gfprune.training.timestep_density import TimestepDensity

ROOT = Path(__file__).resolve().parent.parent


LOSS_THRESHOLD = 0.05  # Diff-Pruning's


def attention_scales(unet: nn.Module) -> dict[str, float]:
    """1 / sqrt(d) of every attention, where d is the current number of channels per head."""
    found = {name: m for name, m in unet.named_modules() if isinstance(m, Attention)}
    return {name: (m.to_q.out_features / m.heads) ** -0.5 for name, m in found.items()}


def accumulate_gradients(model: nn.Module, process, images: DiffusionBatch, seed: int) -> int:
    """Sum gradients of the loss on one batch over timesteps 0, 1, 2, ... until it is small, as in `ddpm_prune.py`.

    Only the images of the batch and their conditioning are used.

    Returns:
        Number of timesteps.
    """
    model.eval().zero_grad()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(images.clean.shape, generator=generator)
    largest = 0.0
    for step in range(process.num_train_timesteps):
        batch = DiffusionBatch(images.clean, noise, torch.full((len(noise),), step), images.conditioning)
        prediction = family_of(model).predict(model, batch.inputs(process))
        loss = nn.functional.mse_loss(prediction, batch.target(process))
        loss.backward()
        largest = max(largest, loss.item())
        if loss.item() < largest * LOSS_THRESHOLD:
            return step + 1
    return process.num_train_timesteps


def never_pruned(model: nn.Module) -> list[nn.Module]:
    """Layers whose output channels Torch-Pruning must keep: the output, and in transformers the hidden size."""
    if family_of(model).component != "transformer":
        return [model.conv_out]
    branches = [layer for block in model.transformer_blocks for layer in (block.attn1.to_out[0], block.ff.net[2])]
    return [model.pos_embed.proj, *branches, model.proj_out_1, model.proj_out_2]


def prune_once(model: nn.Module, example: dict, ratio: float) -> nn.Module:
    """Prune a copy of a model that has gradients, by Torch-Pruning at one uniform ratio."""
    small = copy.deepcopy(model)
    for mine, theirs in zip(small.parameters(), model.parameters()):
        mine.grad = None if theirs.grad is None else theirs.grad.clone()
    heads = {}
    for module in small.modules():
        if isinstance(module, Attention):
            heads |= dict.fromkeys((module.to_q, module.to_k, module.to_v), module.heads)
    pruner = tp.pruner.BasePruner(
        small,
        example,
        importance=tp.importance.GroupTaylorImportance(multivariable=False),
        iterative_steps=1,
        num_heads=heads,
        pruning_ratio=ratio,
        ignored_layers=never_pruned(small),
    )
    for group in pruner.step(interactive=True):
        group.prune()
    for module in small.modules():
        if isinstance(module, (Upsample2D, Downsample2D)):
            module.channels, module.out_channels = module.conv.in_channels, module.conv.out_channels
    return small


def layer_widths(model: nn.Module) -> dict[str, int]:
    """Output channels of all convolutions and linear layers, by name."""
    return {name: len(layer.weight) for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}


def example_of(model: nn.Module) -> dict[str, object]:
    """Inputs of one sample by the names of the model's arguments, for Torch-Pruning's trace."""
    family = family_of(model)
    inputs = family.example_inputs(model, *spatial_size(model))
    first = next(iter(inspect.signature(model.forward).parameters))
    return {first: inputs.sample, "timestep": inputs.timesteps + 1, **inputs.conditioning}


def torch_pruning(
    args: Arguments, model: nn.Module, process, batch: DiffusionBatch, step_loss: StepLoss
) -> tuple[nn.Module, dict]:
    """Torch-Pruning's model nearest to the budget, and a report of the pruning."""
    dense_macs = count_macs(model)
    timesteps = accumulate_gradients(model, process, batch, args.run.seed)
    example = example_of(model)
    best, tried = None, {}
    for percent in range(10, 90, 2):
        small = prune_once(model, example, percent / 100)
        removed = 1 - count_macs(small) / dense_macs
        tried[percent] = removed
        if best is None or abs(removed - args.pruning.ratio) < abs(tried[best[0]] - args.pruning.ratio):
            best = percent, small
        if removed > args.pruning.ratio + 0.1:
            break
    percent, small = best
    before, after = attention_scales(model), attention_scales(small)
    model.zero_grad()
    small.zero_grad()
    report = {
        "version": tp.__version__,
        "timesteps": timesteps,
        "pruning_ratio": percent / 100,
        "macs_removed": tried[percent],
        "macs_removed_by_ratio": {str(key): value for key, value in tried.items()},
        "widths": layer_widths(small),
        "step_loss_dense": step_loss(model),
        "step_loss_after_pruning": step_loss(small),
        "attention_scale_ratio": {name: after[name] / before[name] for name in after},
    }
    return small, {"peer": report}


def with_widths(unet: nn.Module, widths: dict[str, int], seed: int = 0) -> GFPrunedUNet2DModel:
    """A pruned model with random weights.

    Args:
        unet: The dense model, for the architecture.
        widths: Channels of each group, as in results of the study. Widths that units do not allow, in older results, are
            replaced by the nearest width.
        seed: Seed of the weights.
    """
    pruner = GradientFlowPruner(copy.deepcopy(unet), GFPruneConfig(total_steps=1, criterion="random"))
    # With random weights, it does not matter which units are kept
    masks = {}
    for group in pruner.groups:
        wanted = widths.get(group.name, group.num_channels)
        nearest = min(width_ladder(group), key=lambda width, wanted=wanted: abs(width - wanted))
        masks[group.name] = group.per_channel(select_units(group, torch.ones(group.num_units), nearest).float())
    pruner.set_masks(masks)
    config = pruner.compact().config
    torch.manual_seed(seed)
    return GFPrunedUNet2DModel.from_config(config)


def gradient_batch(args: Arguments, pipeline: TrainedPipeline, images: ImageSource) -> DiffusionBatch:
    """The batch whose gradients Torch-Pruning reads: the first images; for latent models, drawn ones with conditioning."""
    size = args.pruning.calibration_batch_size or args.training.train_batch_size
    if pipeline.codec is None:
        clean = images.head(size)
        return DiffusionBatch(clean, torch.zeros_like(clean), torch.zeros(len(clean), dtype=torch.long))
    return calibration_batches(images, 1, size, process=pipeline.process, seed=args.run.seed, step=0)[0]


def scratch(args: Arguments, unet: nn.Module, results_folder: Path) -> tuple[nn.Module, dict]:
    """A model with random weights in the widths of the setting two-phase with the same seed."""
    path = results_folder / f"two-phase-seed{args.run.seed}.json"
    if not path.is_file():
        raise ValueError(f"results={results_folder} holds no {path.name}: run the setting two-phase first")
    return with_widths(unet, json.loads(path.read_text())["widths"], args.run.seed), {}


def fine_tune(args: Arguments, student: nn.Module, objective: Objective, process, images) -> nn.Module:
    """Train as `prune_ddpm.py` does after compaction, for all steps of the run; returns the averaged weights.

    The student may be any module, such as a model of Torch-Pruning, which `TrainingState` does not take.
    """
    t = args.training
    student.train().requires_grad_(True)
    model = NoisePrediction(student)
    optimizer = torch.optim.AdamW(
        student.parameters(),
        lr=t.learning_rate,
        betas=(t.adam_beta1, t.adam_beta2),
        weight_decay=t.adam_weight_decay,
        eps=t.adam_epsilon,
    )
    lr_scheduler = make_lr_scheduler(t, optimizer)
    ema = EMAModel(student.parameters(), decay=t.ema_max_decay, use_ema_warmup=True, power=0.75) if t.use_ema else None
    density = TimestepDensity() if t.timestep_sampling == "importance" else None
    stratified, weights = t.timestep_sampling != "independent", None
    batches = train_dataloader(images, t.train_batch_size, seed=args.run.seed, process=process, stratified=stratified)
    for step, (batch, times, _) in zip(tqdm(range(t.max_train_steps), desc="fine-tuning"), batches):
        seed_everything(args.run.seed, step, 0)
        if density is not None:
            batch, times, weights = density.redraw(batch, times, process)
        loss, _, squares = objective(model, batch, image_weights=weights)
        loss.backward()
        if density is not None:
            density.add(times, squares)
            density.finish_step(lambda total: total)
        nn.utils.clip_grad_norm_(student.parameters(), t.max_grad_norm or math.inf)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.step(student.parameters())
    if ema is not None:
        ema.copy_to(student.parameters())
    return student.eval().requires_grad_(False)


def by_hand(args: Arguments, model: nn.Module) -> tuple[nn.Module, dict]:
    """A model without blocks that were chosen by hand, with the widths of the dense one elsewhere."""
    small, removed = remove_by_hand(model, args.pruning.ratio)
    return small, {"removed_blocks": sorted(removed)}


def main(argv: list[str] | None = None, loss: Callable[[Objective], Objective] | None = None) -> None:
    """Run a baseline; arguments as in `prune_ddpm.main`."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--baseline", choices=("scratch", "torch-pruning", "by-hand"), required=True)
    parser.add_argument("--results", type=Path, required=True, help="Folder of the study's results.")
    options, words = parser.parse_known_args(argv)
    args = parse_arguments(words)
    accelerator = Accelerator(cpu=True)
    pipeline = load_pipeline(args.model.pretrained_model_name_or_path, args.model.revision)
    model, process = pipeline.denoiser, pipeline.process
    images, held_out = load_images(args.data, ModelSpec.of(model, pipeline.codec, pipeline.prompts))
    dense = copy.deepcopy(model).eval().requires_grad_(False)
    captioned = None if pipeline.prompts is None else held_out
    quality = SampleQuality(args.evaluation, dense, pipeline.scheduler, images, accelerator.device, pipeline.codec, captioned)
    images.prepare(accelerator.device)
    step_loss = StepLoss(held_out.samples, process, held_out.conditioning)
    if options.baseline == "scratch":
        student, extra = scratch(args, model, options.results)
    elif options.baseline == "by-hand":
        student, extra = by_hand(args, model)
    else:
        student, extra = torch_pruning(args, model, process, gradient_batch(args, pipeline, images), step_loss)
    print(f"{options.baseline}: {count_parameters(student):,} parameters, {count_macs(student):,} MACs", flush=True)
    objective = Objective(args.objective, process, teacher=dense)
    if loss is not None:
        objective = loss(objective)
    student = fine_tune(args, student, objective, process, images)
    losses = [measure_step_losses(step_loss, each, images.null_conditioning()) for each in (dense, student)]
    measured, _, _ = results(args, dense, student, quality, len(held_out), losses)
    folder = Path(args.run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    total = args.training.max_train_steps
    phases = {"soft_end_step": 0, "hard_end_step": 0, "total_steps": total, "update_interval": 0}
    command = command_line(argv, "benchmarks/study_baselines.py")
    write_json(folder / "pruning_report.json", {"phases": phases, "command": command, **extra})
    if pipeline.codec is not None:  # these models are measured here, since not all of them can be saved
        write_json(folder / "digits.json", digit_figures(pipeline.folder, student))
    write_json(folder / "results.json", measured.to_dict())


if __name__ == "__main__":
    with one_line_errors("study_baselines.py"):
        main()
