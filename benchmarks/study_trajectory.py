"""A run of the study that ends on the sampler's trajectories, and the errors of its model there.

    python benchmarks/study_trajectory.py --fraction 0.1 --share 1 --recipe digits --seed 0 --output_dir DIR

A model is trained on noisy images of the data, and sampled at noisy images of its own making. Late in the run, states x_t of
the sampler therefore replace a share of every batch. They are those of DDIM, with the steps that samples are measured with,
and of the student: the prediction that is trained at x_t also takes the step to the next state, so that no forward pass is
added. The target is the teacher's prediction, as elsewhere. The first trajectories begin at different steps, with noisy
training images. Those that end begin again with noise.

Afterwards, |e - E|^2 of the student e and the teacher E is measured at each step of the sampler, on three kinds of noisy
images: those of the student's trajectories, those of the teacher's, and held-out images with noise. If errors are as large on
all of them, training on trajectories has nothing to mend. `pruning_report.json` has them as `trajectory`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusers_gfprune.argument_fields import SHARE, check_range
from diffusers_gfprune.data.images import load_images
from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.diffusion.process import Sampler
from diffusers_gfprune.errors import one_line_errors
from diffusers_gfprune.model_spec import ModelSpec
from diffusers_gfprune.objectives.objective import BatchLoss, Objective
from diffusers_gfprune.reports.provenance import command_line
from diffusers_gfprune.run_folder import write_json
from diffusers_gfprune.scripts import prune_ddpm
from diffusers_gfprune.trained_pipelines import load_pipeline
from diffusers_gfprune.training.arguments import Arguments, parse_arguments

__all__ = ["TrajectoryLoss", "errors_along"]


class TrajectoryLoss:
    """A training loss, of which the last calls see states of the sampler.

    Args:
        loss: The loss, with the teacher's predictions as the only target.
        sampler: A deterministic sampler without a state, of images in pixels.
        first_call: Number of calls before the first with trajectories.
        share: Share of a batch that is replaced, in [0, 1].

    Attributes:
        states: Noisy images of the trajectories, with shape `(rows, channels, height, width)`; None before the first.
        places: Index of each among the sampler's timesteps, with shape `(rows,)`.
    """

    def __init__(self, loss: Objective, sampler: Sampler, first_call: int, share: float) -> None:
        self.loss, self.sampler, self.share = loss, sampler, share
        self.calls_left = first_call
        self.states: Tensor | None = None
        self.places = torch.empty(0, dtype=torch.long)

    def __call__(
        self, model: nn.Module, batch: DiffusionBatch, directions: Tensor | None = None, image_weights: Tensor | None = None
    ) -> BatchLoss:
        """The loss of a batch; see `Objective`. Images that were replaced have weight 1 and squares of NaN.

        Raises:
            ValueError: The batch has conditioning.
        """
        if batch.conditioning:
            raise ValueError(f"the batch has {', '.join(batch.conditioning)}, but trajectories are of unconditional models")
        rows = round(self.share * len(batch))
        if self.calls_left > 0 or rows == 0:
            self.calls_left -= 1
            return self.loss(model, batch, directions, image_weights)
        timesteps = self._begin(batch, rows)
        batch = dataclasses.replace(
            batch,
            clean=torch.cat([batch.clean[rows:], torch.zeros_like(self.states)]),
            noise=torch.cat([batch.noise[rows:], self._as_noise(timesteps)]),
            timesteps=torch.cat([batch.timesteps[rows:], timesteps]),
        )
        if image_weights is not None:
            image_weights = torch.cat([image_weights[rows:], torch.ones(rows)])
        outputs = []

        def observed(*inputs, **options) -> Tensor:
            outputs.append(model(*inputs, **options))
            return outputs[-1]

        found = self.loss(observed, batch, directions, image_weights)
        self._advance(outputs[0].detach().float()[-rows:])
        # The density of timesteps is measured on images of the data, in the order of the batch that was given
        return found._replace(squares=torch.cat([torch.full((rows,), torch.nan), found.squares[:-rows]]))

    def _begin(self, batch: DiffusionBatch, rows: int) -> Tensor:
        """Begin trajectories where there are none. Returns the timesteps of all."""
        steps = len(self.sampler.timesteps)
        if self.states is None:
            self.places = torch.arange(rows) * steps // rows
            timesteps = self.sampler.timesteps[self.places]
            self.states = self.loss.process.add_noise(batch.clean[:rows], batch.noise[:rows], timesteps)
        ended = self.places == steps
        self.states[ended] = batch.noise[:rows][ended]
        self.places[ended] = 0
        return self.sampler.timesteps[self.places]

    def _as_noise(self, timesteps: Tensor) -> Tensor:
        """Noise that `add_noise` makes the states of, with images that are 0."""
        ones = torch.ones_like(self.states)
        return self.states / self.loss.process.add_noise(torch.zeros_like(ones), ones, timesteps)

    def _advance(self, predictions: Tensor) -> None:
        """Take the step of every trajectory."""
        for place in self.places.unique().tolist():
            here = self.places == place
            timestep = self.sampler.timesteps[place]
            self.states[here] = self.sampler.step(predictions[here], timestep, self.states[here], [])
        self.places += 1


@torch.no_grad()
def errors_along(student: nn.Module, teacher: nn.Module, process, sampler: Sampler, images: Tensor) -> dict[str, list[float]]:
    """Mean squared difference between the predictions of two UNets, at each step of a sampler.

    Args:
        student: The pruned UNet.
        teacher: The dense one.
        process: Process of their training.
        sampler: A deterministic sampler without a state.
        images: Held-out images, with shape `(images, channels, height, width)`.

    Returns:
        By name, with one value for each step: `timesteps`, and the difference on trajectories of the student (`own`) and of
        the teacher (`dense`) from the same noise, and on images with noise (`held_out`).
    """
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(images.shape, generator=generator)
    dense, found = own.clone(), {name: [] for name in ("timesteps", "own", "dense", "held_out")}
    for timestep in sampler.timesteps:
        times = timestep.expand(len(images))
        noisy = process.add_noise(images, torch.randn(images.shape, generator=generator), times)
        predicted = {
            name: [unet(state, times).sample for unet in (student, teacher)]
            for name, state in (("own", own), ("dense", dense), ("held_out", noisy))
        }
        found["timesteps"].append(int(timestep))
        for name, (ours, theirs) in predicted.items():
            found[name].append((ours - theirs).square().mean().item())
        own = sampler.step(predicted["own"][0], timestep, own, [])
        dense = sampler.step(predicted["dense"][1], timestep, dense, [])
    return found


def sampler_of(args: Arguments, process) -> Sampler:
    """The sampler that the samples of a run are measured with."""
    steps, spacing, _ = process.fit_sampling(args.evaluation.ddim_num_inference_steps, args.evaluation.timestep_spacing)
    return process.sampler(steps, spacing)


def main(argv: list[str] | None = None, loss: Callable[[Objective], Objective] | None = None) -> None:
    """Run `prune_ddpm.main` with trajectories, and measure errors; arguments as there."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--fraction", type=float, required=True, help="Share of the run, at its end, with trajectories.")
    parser.add_argument("--share", type=float, default=1.0, help="Share of a batch that is replaced.")
    options, words = parser.parse_known_args(argv)
    check_range(SHARE, fraction=options.fraction, share=options.share)
    args = parse_arguments(words)
    if args.objective.distillation_weight != 1 or args.training.gradient_accumulation_steps != 1:
        raise ValueError("distillation_weight and gradient_accumulation_steps must be 1: a call of the loss is a step")
    first = round((1 - options.fraction) * args.training.max_train_steps)

    def with_trajectories(objective: Objective) -> TrajectoryLoss:
        objective = objective if loss is None else loss(objective)
        return TrajectoryLoss(objective, sampler_of(args, objective.process), first, options.share)

    prune_ddpm.main(words, loss=with_trajectories)
    folder = Path(args.run.output_dir)
    dense, pruned = (load_pipeline(str(p), pruned=True) for p in (args.model.pretrained_model_name_or_path, folder))
    _, held_out = load_images(args.data, ModelSpec.of(dense.denoiser, dense.codec, dense.prompts))
    models = (pruned.denoiser.eval(), dense.denoiser.eval())
    report = json.loads((folder / "pruning_report.json").read_text())
    report["command"] = command_line(argv, "benchmarks/study_trajectory.py")
    report["trajectory"] = {
        **{"fraction": options.fraction, "share": options.share},
        **errors_along(*models, dense.process, sampler_of(args, dense.process), held_out.samples),
    }
    write_json(folder / "pruning_report.json", report)


if __name__ == "__main__":
    with one_line_errors("study_trajectory.py"):
        main()
