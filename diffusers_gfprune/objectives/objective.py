"""Training loss of the pruned model: the prediction of its process, and distillation from the dense model (the teacher).

    L = (1 - w) |e - target|^2 + w |e - E|^2 + w_f D_f + w_s D_s

e is the student's prediction, E the teacher's, w `distillation_weight`; squares are means over images, channels and pixels.
The teacher's prediction approximates the mean of the target given the noisy image: the same target with less variance. Where
images and noise determine no target, as for consistency models, w is 1. If the process scales outputs (`output_scale`), both
terms are distances between scaled outputs.

With `snr_gamma`, the squares of both terms are weighted by timestep, see `snr_weights.py`. Further terms are:

- |s - S|^2 for models with learned variances s: the variance half of the output has no other target than the teacher's S,
  since the loss of noise prediction does not see it. Its weight is 1.
- D_f, `feature_distillation_weight`: relative distance of block outputs, see `distillation_features.py`.
- D_s, `sensitivity_matching_weight`: distance between the responses to a small change of the noisy input, see
  `jacobian_matching.py`.

Each distance is a mean over images, so that a batch can be split over processes, and 0 if the student equals the teacher. An
image may have a weight in all of them, where timesteps are not drawn from their distribution (`training/timestep_density.py`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from ..argument_fields import SHARE, Range, argument, check_fields
from ..diffusion.batch import DiffusionBatch, ModelInputs
from ..diffusion.ddpm import DDPMProcess
from ..diffusion.process import DiffusionProcess
from ..diffusion.schedulers import training_process
from ..families.base import Family
from ..families.lookup import family_of
from ..pruning.masking import ChannelMasks
from .distillation_features import BlockOutputDistance
from .jacobian_matching import default_step, sensitivity_distance, with_steps
from .snr_weights import min_snr_weights

__all__ = ["BatchLoss", "NoisePrediction", "Objective", "ObjectiveArguments"]

WEIGHT = Range("be at least 0 and finite", lambda value: 0 <= value < math.inf)
STEP = Range("be greater than 0 and finite", lambda value: 0 < value < math.inf)


@dataclass
class ObjectiveArguments:
    """Options of the training loss."""

    _argument_group_name = "objective"

    distillation_weight: float = argument(
        1.0, "Weight w of the dense model's noise prediction as target, in [0, 1]; the noise has weight 1 - w."
    )
    feature_distillation_weight: float = argument(
        0.0, "Weight of the relative distance to block outputs of the dense model (>= 0)."
    )
    sensitivity_matching_weight: float = argument(
        0.0,
        "Weight of second-order Jacobian matching, (|Jv|^2 - |J_T v|^2)^2 (>= 0; IGSM on 32x32 RGB images: 0.05 with "
        "distillation_weight 0.5).",
    )
    jacobian_step: float | None = argument(
        None,
        "Finite-difference step of Jacobian matching, in standard deviations of the noise (> 0; default: 0.01 in fp32, 0.1 "
        "in fp16, 0.3 in bf16).",
    )

    snr_gamma: float | None = argument(
        None,
        "Min-SNR weighting: errors of the predicted image count min(SNR, gamma); noise predictions get min(1, gamma / SNR), "
        "so that low noise counts less (> 0; 5 is recommended; default: all timesteps alike).",
    )

    def __post_init__(self) -> None:
        check_fields(self, SHARE, "distillation_weight")
        check_fields(self, WEIGHT, "feature_distillation_weight", "sensitivity_matching_weight")
        check_fields(self, STEP, "jacobian_step", "snr_gamma")
        if self.jacobian_step is not None and not self.needs_directions:
            raise ValueError(f"jacobian_step={self.jacobian_step} needs sensitivity_matching_weight")

    @property
    def needs_directions(self) -> bool:
        """Whether a batch needs `directions`."""
        return self.sensitivity_matching_weight > 0

    @property
    def needs_features(self) -> bool:
        """Whether block outputs are compared."""
        return self.feature_distillation_weight > 0

    @property
    def needs_teacher(self) -> bool:
        """Whether every step runs the dense model."""
        return self.distillation_weight > 0 or self.needs_features or self.needs_directions

    def check_model(self, model: nn.Module) -> None:
        """Check that the loss trains all outputs of a dense model.

        Raises:
            ValueError: The model has learned variances, and there is no teacher to learn them from.
        """
        if family_of(model).has_learned_variance(model.config) and not self.needs_teacher:
            raise ValueError(
                f"distillation_weight={self.distillation_weight:g} must be greater than 0: the model has learned variances "
                f"(out_channels={model.config.out_channels}), which only the dense model as a teacher keeps"
            )

    def check_process(self, process: DiffusionProcess) -> None:
        """Check that the loss can be computed for a process.

        Raises:
            ValueError: The loss needs a target that the process does not have, or a weight that is defined for DDPMs only.
        """
        if not process.has_target and self.distillation_weight != 1:
            raise ValueError(
                f"distillation_weight={self.distillation_weight:g} must be 1: the model is {process.title}, which has no "
                f"target but the output of the dense model"
            )
        if self.snr_gamma is not None and not isinstance(process, DDPMProcess):
            raise ValueError(
                f"snr_gamma={self.snr_gamma:g} must be left out: it is for DDPMs, and the model is {process.title}"
            )

    def extra_forwards(self, student_cost: float = 1.0) -> float:
        """Additional cost of a training step, in forward passes of the dense model; a backward counts as two of them.

        Args:
            student_cost: Cost of a forward pass of the student, relative to the dense model.
        """
        second = int(self.needs_directions)  # Jacobian matching runs both models at a second point
        return (1 + second) * self.needs_teacher + 3 * second * student_cost


class _HookState:
    """State of the hooks of a `NoisePrediction` for the current forward pass."""

    def __init__(self) -> None:
        self.features = False
        self.outputs: dict[str, Tensor] = {}
        # Size of a batch whose halves share their dropout. It is kept after the forward, since gradient checkpointing runs
        # layers again in the backward.
        self.paired = 0


def _keep_output(state: _HookState, family: Family, name: str, module: nn.Module, args: tuple, output) -> None:
    if state.features:
        state.outputs[name] = family.stream(output)


def _drop_alike(state: _HookState, module: nn.Dropout, args: tuple, output: Tensor) -> Tensor | None:
    if not module.training or len(args[0]) != state.paired:
        return None
    halves = args[0].chunk(2)
    factors = dropout(torch.ones_like(halves[0]), module.p)
    return torch.cat([half * factors for half in halves])


class NoisePrediction(nn.Module):
    """A denoiser whose forward returns its output as a plain tensor, and optionally block outputs.

    Accelerate wraps, casts and compiles this module for training. The denoiser inside is not modified, for scoring, averaging
    and saving. One forward returns all inputs of the loss, as distributed wrappers require.

    Hooks on blocks and dropouts are registered at construction, since a compiler does not detect new hooks. They are inactive
    unless the forward needs them.

    Args:
        unet: A model of any family, dense, masked or compacted.
        features: Whether the forward can return block outputs.
    """

    def __init__(self, unet: nn.Module, features: bool = False) -> None:
        super().__init__()
        self.unet, self.has_features, self.hook_state = unet, features, _HookState()
        self.family = family_of(unet)
        for name in self.family.block_outputs(unet) if features else ():
            unet.get_submodule(name).register_forward_hook(functools.partial(_keep_output, self.hook_state, self.family, name))
        for module in unet.modules():
            if isinstance(module, nn.Dropout) and module.p > 0:
                module.register_forward_hook(functools.partial(_drop_alike, self.hook_state))

    def forward(
        self,
        sample: Tensor,
        timesteps: Tensor,
        conditioning: Mapping[str, Tensor] | None = None,
        return_features: bool = False,
        pairs: bool = False,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Predict.

        Args:
            sample: Noisy images with shape `(batch, channels, height, width)`.
            timesteps: Timesteps of the process with shape `(batch,)`.
            conditioning: As in `ModelInputs`, for conditional models.
            return_features: Whether to return block outputs as well.
            pairs: Whether the two halves of the batch are compared image by image, and share their dropout.

        Returns:
            The output, with the shape of `sample`, or twice its channels with learned variances (`Family.output`); with
            `return_features` also the output of each block by name, with shape `(batch, channels of the block, ...)` or
            `(batch, tokens, channels of the block)`.

        Raises:
            ValueError: `return_features` is set, but the wrapper was created without `features`.
        """
        if return_features and not self.has_features:
            raise ValueError("return_features=True needs NoisePrediction(unet, features=True)")
        state = self.hook_state
        state.features, state.paired = return_features, len(sample) if pairs else 0
        try:
            output = self.family.output(self.unet, ModelInputs(sample, timesteps, conditioning or {}))
            return (output, dict(state.outputs)) if return_features else output
        finally:
            state.features, state.outputs = False, {}


class BatchLoss(NamedTuple):
    """The training loss of a batch. No part of it synchronizes the device.

    Attributes:
        loss: A float32 scalar.
        terms: Its terms before weighting, detached scalars by name: `noise`, the distance to the target of the process, if it
            has one; `distillation` if the teacher runs; `variance` if the model has learned variances; `features` and
            `sensitivity` if they have a weight.
        squares: For each image, the squared gradient of its own loss with respect to the prediction, up to a common factor:
            its error times the square of its weight by timestep. Of noise and teacher, each with its weight; detached, float32
            with shape `(batch,)`.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    squares: Tensor


class Objective:
    """The training loss of a batch.

    Args:
        arguments: Weights of the terms.
        scheduler: Scheduler of the model, or its process.
        teacher: The dense model, on the device of the batches. It is set to evaluation mode, without gradients.
        channel_masks: The student's masks, for block outputs: the `channel_masks` of the masked model, also after compaction.

    Raises:
        ValueError: An argument that a term needs is missing, or the loss cannot be computed for the process.
    """

    def __init__(
        self,
        arguments: ObjectiveArguments,
        scheduler,
        teacher: nn.Module | None = None,
        channel_masks: ChannelMasks | None = None,
    ) -> None:
        self.arguments, self.process = arguments, training_process(scheduler)
        arguments.check_process(self.process)
        self.weights = {
            "noise": 1 - arguments.distillation_weight,
            "distillation": arguments.distillation_weight,
            "features": arguments.feature_distillation_weight,
            "sensitivity": arguments.sensitivity_matching_weight,
            "variance": 1.0,
        }
        self.teacher, self.block_output_distance = None, None
        if teacher is not None:
            arguments.check_model(teacher)
        if not arguments.needs_teacher:
            return
        if teacher is None:
            raise ValueError("teacher=None: distillation needs the dense model")
        if arguments.needs_features:
            if channel_masks is None:
                raise ValueError("channel_masks=None: feature_distillation_weight needs the masks of the student")
            self.block_output_distance = BlockOutputDistance(teacher, channel_masks)
        self.teacher = NoisePrediction(teacher.eval().requires_grad_(False), features=arguments.needs_features).eval()

    def __call__(
        self,
        model: nn.Module,
        batch: DiffusionBatch,
        directions: Tensor | None = None,
        image_weights: Tensor | None = None,
    ) -> BatchLoss:
        """Compute the loss, under the caller's autocast.

        Args:
            model: The student, a `NoisePrediction` or a wrapper of it.
            batch: The images, on the model's device.
            directions: For Jacobian matching, Gaussian noise with the shape of the batch's noise, independent of it.
            image_weights: Weights of the images in all terms, with shape `(batch,)` (default: 1).

        Raises:
            ValueError: `directions` are needed but missing.
        """
        size = len(batch)
        if self.arguments.needs_directions:
            step = self.arguments.jacobian_step or default_step(batch.clean.device)
            inputs, step_lengths = with_steps(self.process, batch, directions, step)
        else:
            inputs = batch.inputs(self.process)

        channels = batch.clean.shape[1]
        output, features = self._output(model, inputs)
        prediction, errors, terms = output[:, :channels], {}, {}
        if self.process.has_target:
            errors["noise"] = _squared_errors(prediction[:size], batch.target(self.process).float())
        if self.arguments.needs_teacher:
            with torch.no_grad():
                teacher_output, teacher_features = self._output(self.teacher, inputs)
            teacher_prediction = teacher_output[:, :channels]
            errors["distillation"] = _squared_errors(prediction[:size], teacher_prediction[:size])
            if teacher_output.shape[1] > channels:
                errors["variance"] = _squared_errors(output[:size, channels:], teacher_output[:size, channels:])
        by_timestep = self._timestep_weights(batch)
        for name, error in errors.items():
            terms[name] = _mean(error if name == "variance" or by_timestep is None else error * by_timestep, image_weights)
        if self.arguments.needs_features:
            own, theirs = ({name: f[:size] for name, f in outputs.items()} for outputs in (features, teacher_features))
            terms["features"] = _mean(self.block_output_distance(own, theirs), image_weights)
        if self.arguments.needs_directions:
            terms["sensitivity"] = _mean(sensitivity_distance(prediction, teacher_prediction, step_lengths), image_weights)
        # A term without a weight stays out of the graph: its backward would take time, and 0 x inf is not 0.
        weighted = [name for name in terms if self.weights[name] > 0]
        loss = sum(self.weights[name] * terms[name] for name in weighted)
        squares = sum(self.weights[name] * errors[name].detach() for name in ("noise", "distillation") if name in weighted)
        if by_timestep is not None:
            squares = squares * by_timestep**2
        return BatchLoss(loss, {name: term.detach() for name, term in terms.items()}, squares)

    def _timestep_weights(self, batch: DiffusionBatch) -> Tensor | None:
        """Weights of squared errors by timestep, with shape `(batch,)`, if they are not all 1."""
        scale = self.process.output_scale(batch.timesteps)
        if scale is not None:
            return scale**2
        if self.arguments.snr_gamma is None:
            return None
        return min_snr_weights(self.process, batch.timesteps, self.arguments.snr_gamma)

    def _output(self, model: nn.Module, inputs: ModelInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Output in float32, and block outputs if they are compared."""
        output = model(*inputs, return_features=self.arguments.needs_features, pairs=self.arguments.needs_directions)
        if not self.arguments.needs_features:
            return output.float(), {}
        return output[0].float(), output[1]


def _squared_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each image, with shape `(batch,)`."""
    return (prediction - target).square().flatten(1).mean(dim=1)


def _mean(distances: Tensor, weights: Tensor | None) -> Tensor:
    """Mean over images, each with its weight."""
    return (distances if weights is None else distances * weights).mean()
