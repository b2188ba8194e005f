"""Prune a trained DDPM by gradient flow in two phases, fine-tune it, and save a Diffusers pipeline.

    accelerate launch --quiet training/prune_ddpm.py --pretrained_model_name_or_path google/ddpm-cifar10-32 \
        --dataset_name uoft-cs/cifar10 --target macs --ratio 0.5 --max_train_steps 100000 --output_dir runs/cifar10

The method is that of Wan et al., arXiv 2501.09464: soft pruning with a falling mask value up to step N, hard pruning up to
step M, then the model is compacted and goes on training at its small size. `--dry_run` prints the plan.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from tqdm.auto import tqdm

from diffusers_gfprune import GradientFlowPruner, PruneDDPMPipeline
from diffusers_gfprune.evaluation.step_loss import StepLoss, noise_target
from diffusers_gfprune.hub import HUB_ERRORS, PushError, prepare_repo, push_checkpoint, push_folder, reason, update_card
from image_data import endless_batches, load_images, stack_rows, train_dataloader
from plots import plot_pruning, plot_widths, save_sample_grid
from provenance import command_line, describe_base_model, describe_dataset
from prune_arguments import parse_arguments
from reporting import describe_plan, pruning_report, results
from run_folder import RunFolder, load_dense_pipeline, write_json

PHASE_NAMES = {"soft": "soft pruning", "hard": "hard pruning", "finetune": "fine-tuning"}


@dataclass
class Curves:
    """What is recorded along the run."""

    schedule_steps: list[int] = field(default_factory=list)
    sparsity: list[float] = field(default_factory=list)
    mask_value: list[float] = field(default_factory=list)
    train_steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    compaction: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("soft", "hard", "finetune", "scoring"), 0.0))


class CalibrationImages:
    """Draws calibration batches from the training images, by a generator of their own.

    Timesteps are spread evenly over the noise levels in every batch (one uniform draw in each of `batch_size` strata), which
    lowers the variance of the scores.
    """

    def __init__(self, dataset, num_batches: int, batch_size: int, num_train_timesteps: int, seed: int) -> None:
        self.dataset, self.num_batches, self.batch_size = dataset, num_batches, min(batch_size, len(dataset))
        self.num_train_timesteps = num_train_timesteps
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self) -> list[tuple[torch.Tensor, ...]]:
        batches = []
        for _ in range(self.num_batches):
            chosen = torch.randperm(len(self.dataset), generator=self.generator)[: self.batch_size]
            images, labels = stack_rows([self.dataset[int(index)] for index in chosen])
            noise = torch.randn(images.shape, generator=self.generator)
            strata = torch.arange(self.batch_size) + torch.rand(self.batch_size, generator=self.generator)
            timesteps = (strata * self.num_train_timesteps / self.batch_size).long().clamp_(max=self.num_train_timesteps - 1)
            batches.append((images, noise, timesteps) if labels is None else (images, noise, timesteps, labels))
        return batches


def training_loss(
    model, noise_scheduler, batch: dict[str, torch.Tensor], teacher=None, distillation_weight: float = 0.0
) -> torch.Tensor:
    """Noise-prediction loss of a batch, with fresh noise and timesteps.

    With a teacher (the dense model), the loss is `(1 - w) |prediction - noise|^2 + w |prediction - teacher's prediction|^2`:
    the teacher's prediction is the mean that noise is drawn around, a target of the same kind with less variance.
    """
    clean_images = batch["pixel_values"]
    noise = torch.randn_like(clean_images)
    steps = noise_scheduler.config.num_train_timesteps
    timesteps = torch.randint(0, steps, (len(clean_images),), device=clean_images.device)
    noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
    labels = batch.get("class_labels")
    prediction = model(noisy_images, timesteps, class_labels=labels).sample.float()
    target = noise_target(noise_scheduler, clean_images, noise, timesteps)
    loss = torch.nn.functional.mse_loss(prediction, target.float())
    if not distillation_weight:
        return loss
    with torch.no_grad():
        teacher_prediction = teacher(noisy_images, timesteps, class_labels=labels).sample.float()
    distance = torch.nn.functional.mse_loss(prediction, teacher_prediction)
    return (1 - distillation_weight) * loss + distillation_weight * distance


def seconds_per_step(model, noise_scheduler, images, batch_size: int, device: torch.device) -> float:
    """Time of a forward and backward of the dense model, the last of three on a copy, for the plan."""
    twin = copy.deepcopy(model).to(device).train().requires_grad_(True)
    pixels, labels = stack_rows([images[index % len(images)] for index in range(batch_size)])
    batch = {"pixel_values": pixels.to(device)}
    if labels is not None:
        batch["class_labels"] = labels.to(device)
    with torch.random.fork_rng():
        for _ in range(3):
            start = time.perf_counter()
            training_loss(twin, noise_scheduler, batch).backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    """Prune as the command line says."""
    # 1. arguments, model, data: everything that can be wrong is found here
    args = parse_arguments(argv)
    inputs = (args.model.pretrained_model_name_or_path, args.data.dataset_name, args.data.train_data_dir)
    folder = RunFolder(args.run.output_dir, args.run.overwrite_output_dir, inputs)
    if not args.run.dry_run:
        folder.check()
    accelerator = Accelerator(mixed_precision=args.training.mixed_precision)
    if accelerator.num_processes > 1:
        raise ValueError(f"num_processes={accelerator.num_processes}: run one process (accelerate launch --num_processes 1)")
    set_seed(args.run.seed)
    unet, noise_scheduler = load_dense_pipeline(args.model.pretrained_model_name_or_path, args.model.revision)
    if unet.config.sample_size is None:
        raise ValueError("the model's config has sample_size=None: set it to the size the model was trained at")
    images, held_out = load_images(args.data, unet.config)
    dataloader = train_dataloader(images, args.training.train_batch_size, args.data.dataloader_num_workers, args.run.seed)
    dense = copy.deepcopy(unet).eval().requires_grad_(False)
    config = args.pruning.config(args.training.max_train_steps)
    pruner = GradientFlowPruner(unet, config, noise_scheduler)
    step_time = seconds_per_step(dense, noise_scheduler, images, args.training.train_batch_size, accelerator.device)
    accelerator.print(describe_plan(pruner, args, step_time))
    if args.run.dry_run:
        return
    origin = {
        "base_model": describe_base_model(args.model.pretrained_model_name_or_path, args.model.revision),
        "dataset": describe_dataset(args.data.dataset_name, args.data.train_data_dir),
        "command": command_line(args.words),
    }
    repo_id = repository(args) if args.hub.push_to_hub and accelerator.is_main_process else None
    with folder:
        if accelerator.is_main_process:
            folder.prepare(dense)
        run(args, accelerator, folder, origin, repo_id, pruner, unet, dense, noise_scheduler, dataloader, images, held_out)
    accelerator.end_training()
    if repo_id is not None:
        url = push_folder(args.run.output_dir, repo_id, token=args.hub.hub_token, private=args.hub.hub_private_repo or None)
        print(f"pushed: {url}")


def repository(args) -> str:
    """The repository to push to, found to be there and writable before any long work."""
    name = args.hub.hub_model_id or Path(args.run.output_dir).name
    try:
        return prepare_repo(name, token=args.hub.hub_token, private=args.hub.hub_private_repo or None)
    except HUB_ERRORS as error:
        raise ValueError(f"push_to_hub to {name} cannot work: {reason(error)}") from error


def run(
    args, accelerator, folder, origin, repo_id, pruner, unet, dense, noise_scheduler, dataloader, images, held_out
) -> None:
    """Train and prune, then measure, save and show."""
    # 2. optimizer, average, calibration and validation images
    t, config = args.training, pruner.config
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=t.learning_rate,
        betas=(t.adam_beta1, t.adam_beta2),
        weight_decay=t.adam_weight_decay,
        eps=t.adam_epsilon,
    )
    lr_scheduler = get_scheduler(
        t.lr_scheduler, optimizer, num_warmup_steps=t.lr_warmup_steps, num_training_steps=t.max_train_steps
    )
    ema = EMAModel(unet.parameters(), decay=t.ema_max_decay, use_ema_warmup=True, power=0.75) if t.use_ema else None
    calibration = CalibrationImages(
        images,
        args.pruning.calibration_batches,
        args.pruning.calibration_batch_size or t.train_batch_size,
        noise_scheduler.config.num_train_timesteps,
        args.run.seed + 1,
    )
    held_out_images, held_out_labels = stack_rows([held_out[index] for index in range(len(held_out))])
    step_loss = StepLoss(held_out_images, noise_scheduler, held_out_labels, batch_size=args.evaluation.eval_batch_size)
    # The model itself stays as it is: `prepare` would wrap its forward in autocast, for scores and measurements too.
    unet.to(accelerator.device)
    optimizer, dataloader, lr_scheduler = accelerator.prepare(optimizer, dataloader, lr_scheduler)
    if ema is not None:
        ema.to(accelerator.device)
    dense_step_loss = step_loss(dense.to(accelerator.device))
    if not t.distillation_weight:
        dense.to("cpu")  # until it is measured beside the pruned one

    # 3. training loop
    curves = Curves()
    batches = endless_batches(dataloader)
    phase, progress = None, None
    recent: list[float] = []
    for step in range(t.max_train_steps):
        # 3a. masks, and compaction once they freeze
        clock = time.perf_counter()
        update = pruner.step(step, calibration)
        if update is not None:
            curves.seconds["scoring"] += time.perf_counter() - clock
        if pruner.finished and phase != "finetune":
            before = step_loss(unet)
            unet = pruner.compact(optimizer=optimizer.optimizer, ema=ema)
            curves.compaction = {"step": step, "step_loss_masked": before, "step_loss_compacted": step_loss(unet)}
        if not pruner.finished:
            curves.schedule_steps.append(step)
            curves.sparsity.append(pruner.schedule.sparsity(step) * config.ratio)
            curves.mask_value.append(pruner.schedule.mask_value(step))
        new_phase = "finetune" if pruner.finished else pruner.schedule.phase(step)
        if new_phase != phase:
            if progress is not None:
                progress.close()
            phase = new_phase
            end = {"soft": pruner.schedule.soft_steps, "hard": pruner.schedule.end_steps}.get(phase, t.max_train_steps)
            progress = tqdm(
                total=min(end, t.max_train_steps) - step,
                desc=PHASE_NAMES[phase],
                disable=not accelerator.is_local_main_process,
            )
        if step % args.evaluation.validation_steps == 0 or (update is not None and phase != "finetune"):
            curves.validation_steps.append(step)
            curves.validation_loss.append(step_loss(unet))

        # 3b. one training step
        clock = time.perf_counter()
        with accelerator.autocast():
            loss = training_loss(unet, noise_scheduler, next(batches), dense, t.distillation_weight)
        value = loss.item()
        if not math.isfinite(value):
            raise ValueError(
                f"the loss is {value} at step {step} ({PHASE_NAMES[phase]}): lower learning_rate={t.learning_rate:g}, or "
                f"look for broken weights in {args.model.pretrained_model_name_or_path}"
            )
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), t.max_grad_norm)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.step(unet.parameters())
        curves.seconds[phase] += time.perf_counter() - clock
        recent.append(value)
        if len(recent) == 10:
            curves.train_steps.append(step)
            curves.train_loss.append(sum(recent) / len(recent))
            recent.clear()
        if phase == "finetune" and args.run.save_model_steps and accelerator.is_main_process:
            if (step + 1) % args.run.save_model_steps == 0 and step + 1 < t.max_train_steps:
                save_model(args, folder, repo_id, unet, ema, noise_scheduler, step + 1)
        progress.update()
        progress.set_postfix(loss=f"{value:.4f}", kept=int(sum(kept.sum() for kept in pruner.kept.values())))
    progress.close()
    if phase != "finetune":  # masks freeze at the very end of the run
        pruner.step(t.max_train_steps, calibration)
        before = step_loss(unet)
        unet = pruner.compact(ema=ema)
        curves.compaction = {"step": t.max_train_steps, "step_loss_masked": before, "step_loss_compacted": step_loss(unet)}
    curves.validation_steps.append(t.max_train_steps)
    curves.validation_loss.append(step_loss(unet))
    if ema is not None:
        ema.copy_to(unet.parameters())

    # 4. measure, save, show
    if accelerator.is_main_process:
        dense.to(accelerator.device)
        losses = (dense_step_loss, step_loss(unet))
        finish(args, folder, origin, repo_id, pruner, curves, unet, dense, noise_scheduler, images, len(held_out), losses)


def save_model(args, folder, repo_id, unet, ema, noise_scheduler, step: int) -> None:
    """Save the pipeline as it is, and push it if that is wanted; a push that fails is no reason to stop."""
    if ema is not None:
        ema.store(unet.parameters())
        ema.copy_to(unet.parameters())
    try:
        folder.save(PruneDDPMPipeline(unet=unet, scheduler=noise_scheduler).save_pretrained)
    finally:
        if ema is not None:
            ema.restore(unet.parameters())
    if repo_id is not None and args.hub.hub_strategy == "every_save":
        message = f"Step {step} of {args.training.max_train_steps}"
        try:
            push_checkpoint(folder.staging, repo_id, token=args.hub.hub_token, commit_message=message)
        except (PushError, ValueError) as error:
            tqdm.write(f"warning: {error}; training goes on", file=sys.stderr)


def finish(args, folder, origin, repo_id, pruner, curves, unet, dense, noise_scheduler, images, num_held_out, losses) -> None:
    """Write pipeline, results, report, card and pictures, and make the run folder appear."""
    unet.requires_grad_(False).eval()
    folder.save(PruneDDPMPipeline(unet=unet, scheduler=noise_scheduler).save_pretrained)
    measured, dense_samples, samples = results(args, dense, unet, noise_scheduler, images, num_held_out, losses)
    write_json(folder.staging / "results.json", measured)
    report = pruning_report(args, pruner, curves, losses[0], origin)
    write_json(folder.staging / "pruning_report.json", report)
    plot_pruning(folder.staging / "pruning.png", report)
    plot_widths(folder.staging / "widths.png", report)
    if samples is not None:
        save_sample_grid(folder.staging / "samples.png", dense_samples, samples)
    update_card(folder.staging, repo_id or args.hub.hub_model_id or folder.path.name)
    folder.publish()
    print_results(measured, folder)


def print_results(measured: dict, folder: RunFolder) -> None:
    """The figures that matter, dense beside pruned."""
    rows = [
        ("parameters", "parameters", "{:,}"),
        ("MACs", "macs", "{:,}"),
        ("step loss (held out)", "step_loss", "{:.4f}"),
        ("FD-pixels", "fd_pixels", "{:.3f}"),
        ("SSIM to dense", "ssim_to_dense", "{:.3f}"),
        ("latency in ms", "latency_ms", "{:.2f}"),
    ]
    print(f"\n{'':22}{'dense':>14}{'pruned':>14}")
    for title, key, form in rows:
        values = [measured[which].get(key, measured[which]["latency"].get(key)) for which in ("dense", "pruned")]
        if any(value is not None for value in values):
            print(f"{title:22}" + "".join(f"{form.format(value) if value is not None else '-':>14}" for value in values))
    print(f"\nsaved: {folder.path}  (DiffusionPipeline.from_pretrained after `import diffusers_gfprune`)")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"prune_ddpm.py: error: {' '.join(str(error).split())}")
