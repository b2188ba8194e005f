"""Estimate of time and memory of a run on this machine: seconds of a step, and bytes while training and scoring.

With W bytes of weights and A(b) bytes of activations, which the forward of b images keeps for the backward, a step peaks at

    weights W + moments 2W (a quarter of that with 8 bits) + W + A(b)

The third term is that of the gradients, which grow while activations are freed, or, while masks are attached, that of the
masked weights. Ranking channels by H g takes a multiple of this peak in full precision. Scores in the metric of predictions
take a multiple of A(b), without gradients of the weights. The multiples, and the overhead of convolution workspaces and the
allocator, were measured for `benchmarks/README.md`. Averaged weights and the teacher are added.

A(b) is counted on fake tensors, which have shapes but no memory and no values: the distinct storages that autograd saves,
except those of parameters. Counting takes neither the time nor the memory of a forward, at any batch size. Time is measured on
few images and extrapolated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..criteria import find_criterion
from ..diffusion.batch import DiffusionBatch
from ..diffusion.schedulers import training_process
from ..families.lookup import family_of
from ..formatting import format_size
from ..metrics.model_size import parameter_bytes, spatial_size
from ..metrics.speed import seconds_of

__all__ = ["MemoryPlan", "StepEstimate", "count_activations", "estimate_step", "machine_memory", "memory_plan"]

AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Resident size / counted bytes of a step on the CIFAR-10 model (1,028 / 926 MiB)
WORKSPACE = 1.1
# Peak of a scoring pass with Hessian-gradient products / peak of a step on as many images, by `hvp`
HESSIAN_MEMORY = {"exact": 2.4, "finite-difference": 1.2}
# Limit on the timing of a step in seconds; a single image is always timed
TIME_LIMIT = 5.0


@dataclass(frozen=True)
class StepEstimate:
    """Time and memory of one step.

    Attributes:
        batch_size: Number of images in the step.
        seconds: Time of forward and backward.
        timed_batch_size: Number of images that were timed; `seconds` is extrapolated from them.
        weight_bytes: Size of all parameters.
        activation_bytes: Activations that the forward keeps for the backward, in the training precision.
        scoring_batch_size: Number of images in a calibration batch.
        scoring_activation_bytes: Activations that the forward of a calibration batch keeps, in full precision.
    """

    batch_size: int
    seconds: float
    timed_batch_size: int
    weight_bytes: int
    activation_bytes: int
    scoring_batch_size: int
    scoring_activation_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a run in bytes.

    Attributes:
        training: Total at the peak of a step.
        scoring: Total at the peak of a ranking.
        free: Available memory.
        lines: Lines to print: a summary, and advice in a second line if the run does not fit.
    """

    training: int
    scoring: int
    free: int
    lines: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the run fits into the available memory."""
        return max(self.training, self.scoring) <= self.free


def _autocast(device: torch.device, mixed_precision: str) -> AbstractContextManager:
    dtype = AUTOCAST.get(mixed_precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def count_activations(
    unet: nn.Module,
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    mixed_precision: str = "no",
    gradient_checkpointing: bool = False,
) -> int:
    """Count the bytes that a forward in training mode keeps for the backward, without running it.

    Args:
        unet: A model of any family; only its configuration is used.
        batch_size: Number of images (>= 1).
        device: Device of the forward; kernels and autocast rules differ.
        mixed_precision: `"no"`, `"fp16"` or `"bf16"`. Copies of weights made by autocast are counted.
        gradient_checkpointing: Whether blocks keep only their inputs.
    """
    device = torch.device(device)
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)  # keep the tensor, so that its address is not reused
        return tensor

    with torch.random.fork_rng(devices=[]), FakeTensorMode(), torch.device(device):
        twin = type(unet).from_config(unet.config).train()
        if gradient_checkpointing:
            twin.enable_gradient_checkpointing()
        inputs = family_of(twin).example_inputs(twin, *spatial_size(twin), batch_size, device)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.enable_grad():
            with _autocast(device, mixed_precision):
                prediction = family_of(twin).predict(twin, inputs)
            loss = torch.nn.functional.mse_loss(prediction.float(), torch.zeros_like(inputs.sample))
        for parameter in twin.parameters():
            saved.pop(parameter.untyped_storage()._cdata, None)
        del loss
        return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def _time(step: Callable[[int], float], batch_size: int, fits: Callable[[int], bool], time_limit: float) -> tuple[float, int]:
    """Seconds for `batch_size` images, extrapolated from as many as fit into `time_limit` seconds, and that number.

    The number is doubled while the next run is expected to end in time. Each number is run twice if time is left, since the
    first run of a shape includes one-time setup. The very first run also loads code, and does not count against the limit. An
    image is not expected to take longer in a larger batch.
    """
    size, spent, seconds = 1, 0.0, step(1)
    if seconds <= time_limit:
        spent = step(1)
        seconds = min(seconds, spent)
    while size < batch_size:
        following = min(2 * size, batch_size)
        expected = seconds * following / size
        if spent + expected > time_limit or not fits(following):
            break
        size, first = following, step(following)
        spent += first
        seconds = min(first, expected)
        if spent + first <= time_limit:
            again = step(size)
            spent += again
            seconds = min(seconds, again)
    return seconds * batch_size / size, size


def _forward_backward(
    unet: nn.Module, process, batch_size: int, *, device: torch.device, mixed_precision: str, peaks: dict[int, int]
) -> float:
    """Seconds of a forward and backward; on CUDA, sets `peaks[batch_size]` to the peak of allocated bytes."""
    cuda = device.type == "cuda"
    unet.zero_grad()
    family = family_of(unet)
    inputs = family.example_inputs(unet, *spatial_size(unet), batch_size, device, next(unet.parameters()).dtype)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(inputs.sample.shape, generator=generator).to(device) for _ in range(2))
    timesteps = process.timesteps_at(torch.zeros(batch_size, dtype=torch.float64)).to(device)

    def step() -> None:
        batch = DiffusionBatch(clean, noise, timesteps, inputs.conditioning)
        with _autocast(device, mixed_precision):
            prediction = family.predict(unet, batch.inputs(process, inputs.sample.dtype))
        target = batch.target(process) if process.has_target else noise
        torch.nn.functional.mse_loss(prediction.float(), target.float()).backward()

    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    seconds = seconds_of(step, device)
    if cuda:
        peaks[batch_size] = torch.cuda.max_memory_allocated(device) - held
    return seconds


def estimate_step(
    unet: nn.Module,
    process,
    batch_size: int,
    *,
    device: torch.device | str,
    mixed_precision: str = "no",
    gradient_checkpointing: bool = False,
    scoring_batch_size: int | None = None,
) -> StepEstimate:
    """Estimate a training step on a copy of the model, which is not changed. Global random states are kept.

    Args:
        unet: The dense model, on any device.
        process: Scheduler of the model, or its process.
        batch_size: Number of images in the step (>= 1).
        device: Training device.
        mixed_precision: `"no"`, `"fp16"` or `"bf16"`.
        gradient_checkpointing: Whether activations are recomputed in the backward.
        scoring_batch_size: Number of images in a calibration batch (default: `batch_size`).

    Raises:
        ValueError: A single image does not fit into the device's memory.
    """
    device, process = torch.device(device), training_process(process)
    scoring_batch_size = scoring_batch_size or batch_size
    activations = count_activations(
        unet,
        batch_size,
        device=device,
        mixed_precision=mixed_precision,
        gradient_checkpointing=gradient_checkpointing,
    )
    scoring_activations = count_activations(unet, scoring_batch_size, device=device)
    cuda = device.type == "cuda"

    def fits(size: int) -> bool:
        return activations * size / batch_size < machine_memory(device) / 2

    peaks: dict[int, int] = {}
    with torch.random.fork_rng(devices=[device] if cuda else []), torch.inference_mode(False), torch.enable_grad():
        twin = copy.deepcopy(unet).to(device).train().requires_grad_(True)
        if gradient_checkpointing:
            twin.enable_gradient_checkpointing()
        step = partial(_forward_backward, twin, process, device=device, mixed_precision=mixed_precision, peaks=peaks)
        try:
            seconds, timed = _time(step, batch_size, fits, TIME_LIMIT)
        except torch.OutOfMemoryError as error:
            raise ValueError(f"device={device} has too little memory for a step on a single image") from error
        finally:
            del twin, step
            if cuda:
                torch.cuda.empty_cache()  # otherwise cached memory would count as used
    weights = parameter_bytes(unet)
    # Kernels may keep more than what autograd saves; this can be measured on CUDA only.
    excess = max(1.0, (peaks.get(timed, 0) - weights) / (activations * timed / batch_size))
    activations, scoring_activations = int(activations * excess), int(scoring_activations * excess)
    return StepEstimate(batch_size, seconds, timed, weights, activations, scoring_batch_size, scoring_activations)


def machine_memory(device: torch.device | str) -> int:
    """Free bytes: of a GPU's memory, or of the memory that the operating system can provide without swapping."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def memory_plan(
    estimate: StepEstimate,
    free_bytes: int,
    *,
    criterion: str = "gradient-flow",
    hvp: str = "exact",
    use_8bit_adam: bool = False,
    use_ema: bool = False,
    teacher: bool = False,
    gradient_checkpointing: bool = False,
    gradient_accumulation_steps: int = 1,
    curve_bytes: int = 0,
    recovery_bytes: int = 0,
    device: torch.device | str = "cpu",
) -> MemoryPlan:
    """Add up the memory of a run at its two peaks: training and scoring.

    Args:
        estimate: Estimate of a step.
        free_bytes: Memory that the run may use on the device, including memory that it already holds.
        criterion: Name of the scoring criterion.
        hvp: How H g is computed, if the criterion uses it.
        use_8bit_adam: Whether moments have 8 bits.
        use_ema: Whether weights are averaged.
        teacher: Whether the dense model is on the device, too.
        gradient_checkpointing: Whether it is enabled, and therefore not advised.
        gradient_accumulation_steps: Current value, for the advice.
        curve_bytes: Sums for damage curves, which follow the scoring (`scoring.group_damage.curve_bytes`); 0: there are none.
        recovery_bytes: Sums of recovery (`pruning.recovery.recovery_bytes`); 0: there is none. Its passes take what is free.
        device: Training device.
    """
    record = find_criterion(criterion)
    takes_hessian = record.derivatives == 2
    weights = estimate.weight_bytes
    optimizer = weights // 2 if use_8bit_adam else 2 * weights
    states = weights + weights + optimizer  # the second term: gradients, or masked weights
    per_image = estimate.activation_bytes / estimate.batch_size
    per_scored_image = estimate.scoring_activation_bytes / estimate.scoring_batch_size
    beside = weights * use_ema + weights * teacher

    def training(images: int) -> int:
        return int(WORKSPACE * (states + images * per_image)) + beside

    def scoring(images: int, hvp: str = hvp) -> int:
        if not record.needs_batches:
            return int(WORKSPACE * states) + beside
        activations = images * per_scored_image
        if takes_hessian:
            return int(HESSIAN_MEMORY[hvp] * WORKSPACE * (states + activations)) + beside
        held = states if record.weight_gradients else weights + optimizer
        return int(WORKSPACE * (held + record.activation_memory * activations)) + beside

    curves = int(WORKSPACE * states) + curve_bytes + beside if curve_bytes else 0
    trained, ranked = training(estimate.batch_size), scoring(estimate.scoring_batch_size)
    # The dense model, a copy of it with the weights of this step, and these before and after they change
    mended = int(WORKSPACE * states) + recovery_bytes + weights * (4 - teacher) + beside if recovery_bytes else 0
    scored = max(ranked, curves, mended)
    method = f"hvp={hvp}" if takes_hessian else f"criterion={criterion}"
    place = "this machine" if torch.device(device).type == "cpu" else "this GPU"
    lines = [
        f"memory     about {format_size(scored, 0)} while scoring ({method}), {format_size(trained, 0)} while training; "
        f"{place} has {format_size(free_bytes, 0)} free"
    ]
    advice = []
    if trained > free_bytes:
        fitting = [n for n in range(1, estimate.batch_size) if estimate.batch_size % n == 0 and training(n) <= free_bytes]
        if fitting:
            times = estimate.batch_size // fitting[-1] * gradient_accumulation_steps
            advice.append(f"train_batch_size={fitting[-1]} with gradient_accumulation_steps={times}")
        if not gradient_checkpointing:
            advice.append("gradient_checkpointing")
        if not fitting and not use_8bit_adam:
            advice.append("use_8bit_adam")
    if ranked > free_bytes:
        lightest = hvp
        if takes_hessian and hvp == "exact":
            lightest = "finite-difference"
            advice.append(f"hvp={lightest} ({format_size(scoring(estimate.scoring_batch_size, lightest), 0)})")
        fitting = [n for n in range(1, estimate.scoring_batch_size + 1) if scoring(n, lightest) <= free_bytes]
        if fitting and fitting[-1] < estimate.scoring_batch_size:
            advice.append(f"calibration_batch_size={fitting[-1]}")
    if curves > free_bytes:
        advice.append("ranking=sensitivity")
    if mended > free_bytes:
        advice.append("recovery=none")
    if advice:
        lines.append(f"{'':11}too little; to reduce it: {', '.join(advice)}")
    elif max(trained, scored) > free_bytes:
        lines.append(f"{'':11}too little, even for single images; use a larger device")
    return MemoryPlan(trained, scored, free_bytes, tuple(lines))
