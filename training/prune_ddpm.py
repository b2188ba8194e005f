"""Prune a trained diffusion pipeline by gradient flow in two phases, fine-tune it, and save it as a Diffusers pipeline.

    accelerate launch --quiet training/prune_ddpm.py --pretrained_model_name_or_path google/ddpm-cifar10-32 \
        --dataset_name uoft-cs/cifar10 --target macs --ratio 0.5 --max_train_steps 100000 --output_dir runs/cifar10

The method is that of Wan et al., arXiv 2501.09464: soft pruning with a falling mask value up to step N, hard pruning up to
step M, then the model is compacted and fine-tuned at its small size. The pipeline says what is trained: a UNet or a
transformer, in pixels or in latents, unconditional, with class labels or with text. `--dry_run` prints the plan. A run that
was stopped or killed resumes with `--resume_from_checkpoint latest` and gives the same result as without the interruption.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.errors import one_line_errors
from diffusers_gfprune.evaluation.processes import ERRORS
from diffusers_gfprune.evaluation.sample_quality import SampleQuality
from diffusers_gfprune.hub import push_folder, push_space
from diffusers_gfprune.interruption import Interruption
from diffusers_gfprune.metrics.step_loss import StepLoss
from diffusers_gfprune.model_spec import ModelSpec
from diffusers_gfprune.objectives.objective import Objective
from diffusers_gfprune.reports.provenance import command_line, describe_base_model, describe_dataset
from diffusers_gfprune.run_folder import RunFolder
from diffusers_gfprune.trained_pipelines import load_pipeline
from diffusers_gfprune.training.arguments import Arguments, parse_arguments
from diffusers_gfprune.training.checkpointing import Checkpoints
from diffusers_gfprune.training.finishing import finish, prepared_repository, prepared_space, save_model
from diffusers_gfprune.training.recovery import follow_changes, plan_changes
from diffusers_gfprune.training.rehearsal import rehearse_run
from diffusers_gfprune.training.reporting import describe_pipeline, describe_plan, measure_step_losses
from diffusers_gfprune.training.run_setup import (
    Run,
    check_training,
    estimate_run,
    load_run_images,
    make_batches,
    make_calibration,
    make_pruner,
    run_accelerator,
    run_identity,
)
from diffusers_gfprune.training.safeguards import (
    check_weights,
    examine_first_ranking,
    explained_worker_death,
    find_checkpoint,
    look_for_failures,
    record_loss,
    report_broken_images,
    save_checkpoint,
    stop_if_asked,
    warn,
)
from diffusers_gfprune.training.state import TrainingState, seed_everything
from diffusers_gfprune.training.tracking import Tracking


def main(argv: list[str] | None = None, loss: Callable[[Objective], Objective] | None = None) -> None:
    """Run the script.

    Args:
        argv: Command line arguments (default: those of this process).
        loss: Function of the training loss that returns its replacement, for studies.
    """
    interruption = Interruption()  # knows the launcher from here on
    args = parse_arguments(argv)
    inputs = (args.model.pretrained_model_name_or_path, args.data.dataset_name, args.data.train_data_dir)
    folder = RunFolder(args.run.output_dir, args.run.overwrite_output_dir, inputs)
    folder.check_outside(
        evaluation_cache_dir=args.evaluation.evaluation_cache_dir,
        encoding_cache_dir=args.data.encoding_cache_dir,
        teacher_images_dir=args.teacher.teacher_images_dir,
    )
    accelerator = run_accelerator(args, folder)
    args = dataclasses.replace(args, pruning=args.pruning.on_device(accelerator.device.type))
    writes = accelerator.is_main_process and not args.run.dry_run
    with folder if writes else contextlib.nullcontext():
        if writes:
            folder.lock()
            folder.check(resuming=args.checkpoints.resume_from_checkpoint is not None)
        accelerator.wait_for_everyone()
        prune(args, accelerator, folder, interruption, loss)


def prune(
    args: Arguments,
    accelerator: Accelerator,
    folder: RunFolder,
    interruption: Interruption,
    loss: Callable[[Objective], Objective] | None,
) -> None:
    """A run, in its folder, which is locked. See `main`."""
    # 1. model, data; errors are found here, before training
    resuming, main_process = args.checkpoints.resume_from_checkpoint is not None, accelerator.is_main_process
    with accelerator.main_process_first():  # downloads once
        pipeline = load_pipeline(args.model.pretrained_model_name_or_path, args.model.revision)
        unet, process = pipeline.denoiser, pipeline.process
        check_training(args, unet, process)
        dense = copy.deepcopy(unet).eval().requires_grad_(False)
        images, held_out, measured = run_images = load_run_images(args, pipeline, dense)
    # Add the detected null label, caption column and dropout, for checkpoints and the report
    args = dataclasses.replace(args, data=dataclasses.replace(args.data, **images.choices()))
    make_batches(args, accelerator, images, process, first_batch=0)  # checks that there are enough images
    checkpoints = Checkpoints(folder.training, args.checkpoints.checkpoints_total_limit)
    identity = run_identity(args, dense, process, pipeline.codec, pipeline.prompts)
    checkpoint = find_checkpoint(args, accelerator, checkpoints, identity) if resuming else None
    pruner = make_pruner(args, accelerator, unet, process, checkpoint)
    if main_process and checkpoint is None and not args.run.dry_run:
        folder.check()
    spec = ModelSpec.of(dense, pipeline.codec, pipeline.prompts)
    conditioned = held_out if spec.takes_rows else None
    sample_quality = SampleQuality(
        args.evaluation, dense, pipeline.scheduler, measured, accelerator.device, pipeline.codec, conditioned
    )
    origin = {
        "base_model": describe_base_model(args.model.pretrained_model_name_or_path, args.model.revision),
        "dataset": describe_dataset(args.data.dataset_name, args.data.train_data_dir, images.drawn_by),
        "command": command_line(args.words, num_processes=accelerator.num_processes),
        "num_processes": accelerator.num_processes,
        "pipeline": describe_pipeline(pipeline),
    }
    if main_process:
        estimate = estimate_run(args, accelerator, dense, process)
        print(describe_plan(pruner, args, estimate, accelerator.device, images.summary))
        for change in (*args.pruning.doubts(), *args.training.doubts(), *sample_quality.changes):
            warn(accelerator, f"warning: {change}")
        for line in rehearse_run(args, pruner, sample_quality, len(held_out), origin, folder, pipeline):
            print(f"  {line}")
    if args.run.dry_run:
        return
    repo_id = prepared_repository(args) if args.hub.push_to_hub and main_process else None
    space_id = prepared_space(args) if main_process else None

    # 2. training state, losses and teacher
    if main_process:
        copies = 2 if args.run.save_model_steps else 1  # the saved model is there until its successor is complete
        folder.prepare(copies * pipeline.saved_bytes(), resuming=checkpoint is not None)
    accelerator.wait_for_everyone()
    tracking = Tracking(args, accelerator, folder, sample_quality)
    run_images.prepare(accelerator.device)  # latents and captions are encoded, if the model takes them
    state = TrainingState(args, accelerator, unet, pruner, checkpoint)
    if checkpoint is not None:
        accelerator.print(f"resuming from {checkpoint.path.name}")
    step_loss = StepLoss(
        *(held_out.samples, process, held_out.conditioning),
        batch_size=args.evaluation.eval_batch_size,
        reference=dense,
    )
    dense.to(accelerator.device)
    dense_step_losses = measure_step_losses(step_loss, dense, images.null_conditioning()) if main_process else {}
    objective = Objective(args.objective, process, teacher=dense, channel_masks=unet.channel_masks)
    if args.objective.needs_teacher and args.precision.torch_compile != "no":
        objective.teacher.compile(mode=args.precision.torch_compile, dynamic=False)
    if loss is not None:
        objective = loss(objective)
    if not args.objective.needs_teacher:
        dense.to("cpu")  # until it is sampled beside the pruned model
    run = Run(
        args=args,
        accelerator=accelerator,
        folder=folder,
        checkpoints=checkpoints,
        identity=identity,
        pipeline=pipeline,
        images=images,
        step_loss=step_loss,
        dense_step_losses=dense_step_losses,
        sample_quality=sample_quality,
        objective=objective,
        origin=origin,
        repo_id=repo_id,
    )

    # 3. train and prune; 4. measure, save, plot
    with interruption, contextlib.closing(tracking):  # an error begins a line of its own below the progress bar
        train(run, state, tracking, interruption)
    accelerator.end_training()
    if main_process:
        finish(run, state)
    if repo_id is not None:
        access = {"token": args.hub.hub_token, "private": args.hub.hub_private_repo or None}
        print(f"pushed: {push_folder(args.run.output_dir, repo_id, **access, space_id=space_id)}")
        if space_id is not None:
            print(f"pushed: {push_space(args.run.output_dir, repo_id, space_id, **access)}")


def train(run: Run, state: TrainingState, tracking: Tracking, interruption: Interruption) -> None:
    """The training loop, from the step of `state` to the last step. The model is compacted at its end at the latest."""
    args, accelerator = run.args, run.accelerator
    total, every = args.training.max_train_steps, args.checkpoints.checkpointing_steps
    first = state.step * args.training.gradient_accumulation_steps
    batches = iter(make_batches(args, accelerator, run.images, run.pipeline.process, first))
    while state.step < total:
        # 3a. masks, and compaction when they freeze
        seed_everything(args.run.seed, state.step, accelerator.process_index)
        ranked = update_masks(run, state, tracking)
        tracking.enter_phase(state)
        if not ranked and state.step % args.evaluation.validation_steps == 0:
            validate(run, state, tracking)

        # 3b. one training step
        clock = time.perf_counter()
        loss, terms, gradient_norm = optimization_step(run, state, batches)
        state.curves.seconds[state.phase] += time.perf_counter() - clock
        state.recent.append(loss)
        state.step += 1
        tracking.advance()

        # 3c. curves, samples, models and checkpoints
        if len(state.recent) >= args.tracking.logging_steps:
            mean = record_loss(run, state)
            tracking.log_training(state, mean, {n: float(v) for n, v in terms.items()}, float(gradient_norm))
        if args.evaluation.eval_steps and state.step % args.evaluation.eval_steps == 0 and state.step < total:
            measure_quality(run, state, tracking)
        if args.tracking.sample_steps and state.step % args.tracking.sample_steps == 0:
            tracking.log_samples(state)
        if state.compacted and args.run.save_model_steps and state.step < total:
            if state.step % args.run.save_model_steps == 0 and accelerator.is_main_process:
                save_model(run, state)
        if every and (state.step % every == 0 or state.step == total):
            save_checkpoint(run, state)
        stop_if_asked(run, state, interruption, tracking)
    tracking.close()
    if state.recent:
        record_loss(run, state)
    check_weights(run, state)
    if not state.compacted:  # masks freeze at the end of the run
        update_masks(run, state, tracking)
    validate(run, state, tracking)
    report_broken_images(run, state)


def update_masks(run: Run, state: TrainingState, tracking: Tracking) -> bool:
    """Set masks by the schedule, look for failures after a ranking, recover and compact the model when masks freeze.

    Returns:
        Whether channels were ranked.
    """
    if state.compacted:
        return False
    used = []

    def calibration() -> list[DiffusionBatch]:
        used.extend(make_calibration(run, state.step, state.broken))
        return used

    schedule, masks_before = state.pruner.schedule, None
    if schedule.is_update(state.step):
        validate(run, state, tracking)  # before and after masks change, to detect jumps
        if schedule.phase(state.step) != "soft":
            _, masks_before = state.pruner.goal(state.step)  # where the ranking before led
    clock = time.perf_counter()
    update = state.pruner.step(state.step, calibration)
    if update is not None:
        state.curves.seconds["scoring"] += time.perf_counter() - clock
        examine_first_ranking(run, state, used)  # before weights change
        if run.args.pruning.recovery == "rankings":
            plan_recovery(run, state, used or calibration(), masks_before)
    follow_changes(state)
    if update is not None:
        tracking.log_ranking(state, update)
        validate(run, state, tracking)
        look_for_failures(run, state)
    if state.pruner.finished:
        main_process = run.accelerator.is_main_process
        losses = {"step_loss_masked": run.step_loss(state.unet) if main_process else math.nan}
        if run.args.pruning.recovery == "compaction":
            plan_recovery(run, state, used or calibration())
            follow_changes(state)
            losses["step_loss_recovered"] = run.step_loss(state.unet) if main_process else math.nan
        state.compact()
        if main_process:
            state.curves.compaction = {"step": state.step, **losses, "step_loss_compacted": run.step_loss(state.unet)}
    return update is not None


def plan_recovery(
    run: Run, state: TrainingState, batches: list[DiffusionBatch], masks_before: Mapping[str, Tensor] | None = None
) -> None:
    """Plan changes of weights that make up for what the last ranking removes, from its calibration batches.

    Their targets are the layer outputs of the model with the masks before the ranking, if given, or else of the dense one.
    """
    clock = time.perf_counter()
    plan_changes(state, run.sample_quality.dense, batches, run.args.run.seed, run.accelerator.device, masks_before)
    seconds = state.curves.seconds
    seconds["recovery"] = seconds.get("recovery", 0.0) + time.perf_counter() - clock


def optimization_step(run: Run, state: TrainingState, batches):
    """Forward, backward and update, over `gradient_accumulation_steps` batches.

    Returns:
        Loss and its terms, as means over these batches, and the gradient norm: detached scalars on the device.
    """
    accelerator, t = run.accelerator, run.args.training
    losses, terms = [], []
    torch.compiler.cudagraph_mark_step_begin()  # gradients in a CUDA graph's memory may be overwritten
    for _ in range(t.gradient_accumulation_steps):
        with explained_worker_death(run, state):
            batch, times, weights = next_batch(run, state, batches)
        directions = torch.randn_like(batch.noise) if run.args.objective.needs_directions else None
        with accelerator.accumulate(state.model):
            with accelerator.autocast():
                loss, parts, squares = run.objective(state.model, batch, directions, weights)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                gradient_norm = accelerator.clip_grad_norm_(state.unet.parameters(), t.max_grad_norm or math.inf)
            state.optimizer.step()
            state.optimizer.zero_grad()
        losses.append(loss.detach())
        terms.append(parts)
        if state.timestep_density is not None:
            state.timestep_density.add(times, squares)
    if state.timestep_density is not None:
        state.timestep_density.finish_step(accelerator.reduce)
    if not state.optimizer.step_was_skipped:
        state.lr_scheduler.step()
        if state.ema is not None:
            state.ema.step(state.unet.parameters())
    mean_terms = {name: torch.stack([parts[name] for parts in terms]).mean() for name in terms[0]}
    return torch.stack(losses).mean(), mean_terms, gradient_norm


def validate(run: Run, state: TrainingState, tracking: Tracking) -> None:
    """Measure and log the held-out loss, on the main process."""
    if not run.accelerator.is_main_process:
        return
    loss = run.step_loss(state.unet)
    state.curves.validation_steps.append(state.step)
    state.curves.validation_loss.append(loss)
    tracking.log_validation(state.step, loss)


def measure_quality(run: Run, state: TrainingState, tracking: Tracking) -> None:
    """Measure and log sample quality, on the main process, with averaged weights if there are any."""
    if not run.accelerator.is_main_process:
        return
    with state.averaged() as unet:
        measured = run.sample_quality.measure(unet)
    curves = state.curves
    curves.quality_steps.append(state.step)
    curves.quality_seconds.append(sum(curves.seconds.values()))
    for name in {**curves.quality, **measured}:  # a resumed run may have other features
        values = curves.quality.setdefault(name, [])
        values += [None] * (len(curves.quality_steps) - 1 - len(values))
        values.append(measured.get(name))
    tracking.log_quality(state.step, measured)


def next_batch(run: Run, state: TrainingState, batches) -> tuple[DiffusionBatch, Tensor, Tensor | None]:
    """The next batch, on the device, where its timesteps are in their distribution, and weights of its images in the loss."""
    batch, times, unread = next(batches)
    state.broken.add(unread)
    weights = None
    if state.timestep_density is not None:
        batch, times, weights = state.timestep_density.redraw(batch, times, run.pipeline.process)
        weights = weights.to(run.accelerator.device, non_blocking=True)
    memory_format = torch.channels_last if run.args.precision.channels_last else None
    return batch.to(run.accelerator.device, non_blocking=True, memory_format=memory_format), times, weights


def run_as_program() -> None:
    """Run the script with the command line of this process. User errors are one line and exit status 1."""
    with one_line_errors(Path(sys.argv[0]).name, ERRORS):
        main()


if __name__ == "__main__":
    run_as_program()
