"""Importance: calibration batches in, one score per channel out. The lowest scores are pruned.

With weights theta, noise-prediction loss L, gradient g = dL/dtheta, Hessian H, and sums over the slices of a channel c:

    gradient-flow   sum_c theta (H g)         arXiv 2501.09464; the argument is GraSP's (Wang et al., arXiv 2002.07376):
                                              removing c changes ||g||^2 by -2 theta_c . (H g)_c to first order
    taylor          | sum_c theta g |         Molchanov et al., arXiv 1906.10771
    diff-pruning    sum_c | theta g |         Fang et al., arXiv 2305.10924: g over timesteps whose loss is at least a
                                              share (0.05) of the largest
    magnitude       sum_c theta^2             Li et al., arXiv 1608.08710, with the squared L2 norm
    random          uniform in [0, 1)

A criterion is a function from a `ScoringContext` to scores by group name; `register_criterion` adds your own:

    @register_criterion("my-criterion")
    def my_criterion(context):
        return context.reduce({name: p.detach() ** 4 for name, p in context.parameters.items()}, "sum_abs")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .channel_groups import ChannelGroup
from .configuration import GFPruneConfig
from .double_backward import LeanDoubleBackward
from .evaluation.eval_mode import evaluating
from .evaluation.step_loss import noise_target
from .masking import MASKS_MODULE, dense_parameters

__all__ = ["ScoringContext", "criteria", "normalize_scores", "register_criterion", "score_channels"]

CalibrationBatch = Sequence[Tensor]
Scores = dict[str, Tensor]

_CRITERIA: dict[str, Callable[[ScoringContext], Scores]] = {}


def register_criterion(name: str) -> Callable[[Callable[[ScoringContext], Scores]], Callable[[ScoringContext], Scores]]:
    """Decorator: make a function available as `criterion=name`.

    Raises:
        ValueError: The name is taken.
    """

    def register(function):
        if name in _CRITERIA:
            raise ValueError(f"criterion {name} is registered already")
        _CRITERIA[name] = function
        return function

    return register


def criteria() -> tuple[str, ...]:
    """Names of all registered criteria."""
    return tuple(_CRITERIA)


@dataclass
class ScoringContext:
    """What a criterion sees.

    Attributes:
        unet: The model, in evaluation mode.
        groups: Its channel groups.
        batches: Calibration batches `(clean_images, noise, timesteps[, class_labels])`: images in [-1, 1] and Gaussian
            noise with shape `(batch, channels, height, width)`, int64 timesteps and labels with shape `(batch,)`.
        noise_scheduler: The Diffusers scheduler that adds the noise.
        config: All options.
        parameters: Every parameter with a slice in a group, by dense name.
    """

    unet: nn.Module
    groups: Sequence[ChannelGroup]
    batches: Sequence[CalibrationBatch]
    noise_scheduler: object
    config: GFPruneConfig
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wanted = {piece.name for group in self.groups for piece in group.slices}
        self.parameters = {n: p for n, p in dense_parameters(self.unet).items() if n in wanted}

    def loss(self, batch: CalibrationBatch, sample_weights: Tensor | None = None) -> Tensor:
        """Noise-prediction loss of a batch, a scalar: the mean of errors times `sample_weights (batch,)`."""
        errors = self.sample_losses(batch)
        return errors.mean() if sample_weights is None else (errors * sample_weights).mean()

    def sample_losses(self, batch: CalibrationBatch) -> Tensor:
        """Mean squared error of each sample, with shape `(batch,)`."""
        device = next(iter(self.parameters.values())).device
        clean, noise, timesteps, *labels = (tensor.to(device) for tensor in batch)
        noisy = self.noise_scheduler.add_noise(clean, noise, timesteps)
        labels = labels[0] if labels else None
        prediction = self.unet(noisy.to(self.unet.dtype), timesteps, class_labels=labels).sample.float()
        target = noise_target(self.noise_scheduler, clean, noise, timesteps)
        if prediction.shape != target.shape:
            raise ValueError(f"the model predicts shape {tuple(prediction.shape)}, its target has {tuple(target.shape)}")
        return ((prediction - target) ** 2).mean(dim=(1, 2, 3))

    def gradients(self, loss: Tensor, create_graph: bool = False) -> dict[str, Tensor]:
        """Gradient of a scalar by parameter name."""
        found = torch.autograd.grad(loss, list(self.parameters.values()), create_graph=create_graph)
        return dict(zip(self.parameters, found))

    def summed_gradients(self, losses: Iterable[Tensor]) -> dict[str, Tensor]:
        """Gradient of a sum of scalars by parameter name, added up in place as they come.

        Autograd adds into `.grad`, so that no second set of gradients is ever held; a user's own `.grad` is put back.
        """
        parameters = list(self.parameters.values())
        held = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            for loss in losses:
                torch.autograd.backward(loss, inputs=parameters)
            return {
                name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                for name, parameter in self.parameters.items()
            }
        finally:
            for parameter, gradient in zip(parameters, held):
                parameter.grad = gradient

    def mean_gradient(self, batches: Sequence[CalibrationBatch]) -> dict[str, Tensor]:
        """Gradient of the mean loss over batches."""
        return self.summed_gradients(self.loss(batch) / len(batches) for batch in batches)

    def reduce(self, contributions: Mapping[str, Tensor], aggregation: str) -> Scores:
        """Sum per-weight contributions over the slices of each channel.

        Args:
            contributions: A tensor of its parameter's shape for each name in `parameters`.
            aggregation: `"signed"` (sum), `"abs"` (absolute value of the sum) or `"sum_abs"` (sum of absolute values).

        Returns:
            Scores by group name, float32 with shape `(num_channels,)`.
        """
        along: dict[tuple[str, int], Tensor] = {}
        scores = {}
        for group in self.groups:
            total = None
            for piece in group.slices:
                if self.config.score_slices != "all" and piece.role == "input":
                    continue
                if self.config.score_slices == "weight" and (piece.role, piece.parameter) != ("output", "weight"):
                    continue
                key = (piece.name, piece.dim)
                if key not in along:
                    values = contributions[piece.name].float()
                    values = values.abs() if aggregation == "sum_abs" else values
                    along[key] = values.transpose(0, piece.dim).flatten(1).sum(1) if values.ndim > 1 else values
                part = along[key][list(piece.positions)]
                total = part.clone() if total is None else total.add_(part)
            scores[group.name] = total.abs() if aggregation == "abs" else total
        return scores


@contextmanager
def _scoring_mode(context: ScoringContext) -> Iterator[None]:
    """Evaluation mode, gradients on (for frozen weights too), full precision; at dense weights if asked; attention that
    differentiates twice where that is needed."""
    unet, config = context.unet, context.config
    masks = getattr(unet, MASKS_MODULE, None)
    # Your own criterion may differentiate twice, too.
    once = config.criterion in ("taylor", "diff-pruning", "magnitude", "random") or config.hvp == "finite-difference"
    frozen = [parameter for parameter in context.parameters.values() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with (
            evaluating(unet),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(next(unet.parameters()).device.type, enabled=False),
            masks.suspended() if masks is not None and config.score_at == "dense" else nullcontext(),
            nullcontext() if once else sdpa_kernel(SDPBackend.MATH),
            nullcontext() if once else LeanDoubleBackward(),
        ):
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def score_channels(
    unet: nn.Module,
    groups: Sequence[ChannelGroup],
    batches: Sequence[CalibrationBatch],
    noise_scheduler,
    config: GFPruneConfig,
) -> Scores:
    """Score every channel by `config.criterion`. Weights, masks, gradients and mode of the model are left as they were.

    Args:
        unet: The dense or masked model.
        groups: Its channel groups.
        batches: Calibration batches (see `ScoringContext`).
        noise_scheduler: The Diffusers scheduler that adds the noise.
        config: Criterion and its options.

    Returns:
        Scores by group name, float32 with shape `(num_channels,)`.

    Raises:
        ValueError: No such criterion, no batches, or scores that are not finite.
    """
    if config.criterion not in _CRITERIA:
        raise ValueError(f"criterion={config.criterion} must be one of {', '.join(_CRITERIA)}")
    if config.criterion not in ("magnitude", "random") and len(batches) == 0:
        raise ValueError(f"criterion={config.criterion} needs calibration batches, got none")
    context = ScoringContext(unet, groups, batches, noise_scheduler, config)
    with _scoring_mode(context):
        scores = _CRITERIA[config.criterion](context)
    for name, values in scores.items():
        if not torch.isfinite(values).all():
            raise ValueError(
                f"scores of {name} are not finite: the weights (did training diverge?) or the calibration images hold NaN "
                f"or infinity"
            )
    return scores


def normalize_scores(scores: Scores, method: str) -> Scores:
    """Make scores of different groups comparable.

    Args:
        scores: By group name.
        method: `"none"`, or divide a group's scores by their mean absolute value (`"mean"`), largest absolute value
            (`"max"`) or L2 norm (`"l2"`), or shift and scale them to mean 0 and standard deviation 1 (`"standard"`).

    Returns:
        New scores; a group of zeros stays as it is.
    """
    tiny = torch.finfo(torch.float32).tiny
    forms = {
        "none": lambda s: s,
        "mean": lambda s: s / s.abs().mean().clamp_min(tiny),
        "max": lambda s: s / s.abs().max().clamp_min(tiny),
        "l2": lambda s: s / s.norm().clamp_min(tiny),
        "standard": lambda s: (s - s.mean()) / s.std(correction=0).clamp_min(tiny),
    }
    if method not in forms:
        raise ValueError(f"normalization={method} must be one of {', '.join(forms)}")
    return {name: forms[method](values) for name, values in scores.items()}


def _mean_scores(parts: Sequence[Scores]) -> Scores:
    return {name: torch.stack([part[name] for part in parts]).mean(dim=0) for name in parts[0]}


# --- Hessian-gradient products -----------------------------------------------------------------------------------------


def _exact_product(context: ScoringContext, batches: Sequence[CalibrationBatch]) -> dict[str, Tensor]:
    """H g of the mean loss over `batches`, by double backward: d(g . v)/dtheta with v = g held constant."""
    vector = context.mean_gradient(batches) if len(batches) > 1 else None

    def directional_derivatives() -> Iterator[Tensor]:
        for batch in batches:
            gradient = context.gradients(context.loss(batch) / len(batches), create_graph=True)
            products = [(g * (vector[name] if vector else g.detach())).sum() for name, g in gradient.items()]
            del gradient
            yield torch.stack(products).sum()

    return context.summed_gradients(directional_derivatives())


# Length of the step relative to the weights. The gradient is a steep direction: truncation errors show long before eps^(1/3),
# the textbook step, while half precision cannot represent a shorter one than 1e-3.
FINITE_DIFFERENCE_STEPS = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 1e-3, torch.float16: 1e-3}


def _halves(batches: Sequence[CalibrationBatch]) -> list[tuple[CalibrationBatch, float]]:
    """Each batch in two parts, with the weights that make their losses sum to the mean loss.

    Differences hold two more copies of the weights than a training step does; half a batch at a time, they fit where
    training fits, and sums of gradients do not notice.
    """
    return [
        (part, len(part[0]) / (len(batch[0]) * len(batches)))
        for batch in batches
        for part in zip(*(column.split((len(column) + 1) // 2) for column in batch))
    ]


@torch.no_grad()
def _difference_product(context: ScoringContext, batches: Sequence[CalibrationBatch]) -> dict[str, Tensor]:
    """H g = (grad L(theta + h g) - grad L(theta - h g)) / 2h + O(h^2). Weights are put back bit for bit."""
    with torch.enable_grad():
        vector = context.mean_gradient(batches)
    size = torch.sqrt(sum((p.double() ** 2).sum() for p in context.parameters.values()))
    length = torch.sqrt(sum((v.double() ** 2).sum() for v in vector.values()))
    if length == 0:
        return vector
    relative = max(FINITE_DIFFERENCE_STEPS[parameter.dtype] for parameter in context.parameters.values())
    step = float(relative * size / length)
    saved = {name: parameter.detach().clone() for name, parameter in context.parameters.items()}

    def scaled_losses() -> Iterator[Tensor]:
        for sign in (1.0, -1.0):
            with torch.no_grad():
                for name, parameter in context.parameters.items():
                    if sign > 0:
                        parameter.data.add_(vector.pop(name), alpha=step)
                    else:  # the mirror image, rounding included
                        parameter.data.copy_(2 * saved[name] - parameter.data)
            for part, weight in _halves(batches):
                yield context.loss(part) * (sign * weight / (2 * step))

    try:
        with torch.enable_grad():
            return context.summed_gradients(scaled_losses())
    finally:
        for name, parameter in context.parameters.items():
            parameter.data.copy_(saved[name])


# --- criteria ----------------------------------------------------------------------------------------------------------


@register_criterion("gradient-flow")
def _gradient_flow(context: ScoringContext) -> Scores:
    product = _exact_product if context.config.hvp == "exact" else _difference_product
    batches = [[batch] for batch in context.batches]
    if context.config.hessian_batches == "mean":
        batches = [list(context.batches)]
    parts = []
    for chosen in batches:
        hg = product(context, chosen)
        theta_hg = {name: value.mul_(context.parameters[name].detach()) for name, value in hg.items()}
        parts.append(context.reduce(theta_hg, context.config.aggregation))
    return _mean_scores(parts)


@register_criterion("taylor")
def _taylor(context: ScoringContext) -> Scores:
    gradient = context.mean_gradient(context.batches)
    return context.reduce({n: context.parameters[n].detach() * g for n, g in gradient.items()}, "abs")


@register_criterion("diff-pruning")
def _diff_pruning(context: ScoringContext) -> Scores:
    timesteps = torch.cat([batch[2].cpu() for batch in context.batches])
    with torch.no_grad():
        losses = torch.cat([context.sample_losses(batch).cpu() for batch in context.batches])
    # Timesteps in ascending order; from the first whose loss falls under the threshold on, none counts. Each bucket of
    # neighbouring timesteps has one loss, the mean over its samples.
    order = timesteps.argsort(stable=True)
    bucket_losses = [bucket.mean().item() for bucket in losses[order].chunk(min(20, len(order)))]
    last, largest = timesteps[order[-1]].item(), 0.0
    for bucket, bucket_loss in zip(timesteps[order].chunk(len(bucket_losses)), bucket_losses):
        largest = max(largest, bucket_loss)
        if bucket_loss < largest * context.config.diff_pruning_threshold:
            last = bucket[0].item() - 1
            break
    device = next(iter(context.parameters.values())).device
    total = context.summed_gradients(context.loss(batch, (batch[2] <= last).float().to(device)) for batch in context.batches)
    return context.reduce({n: context.parameters[n].detach() * g for n, g in total.items()}, "sum_abs")


@register_criterion("magnitude")
def _magnitude(context: ScoringContext) -> Scores:
    return context.reduce({name: p.detach() ** 2 for name, p in context.parameters.items()}, "sum_abs")


@register_criterion("random")
def _random(context: ScoringContext) -> Scores:
    generator = torch.Generator().manual_seed(context.config.pruning_seed)
    return {group.name: torch.rand(group.num_channels, generator=generator) for group in context.groups}
