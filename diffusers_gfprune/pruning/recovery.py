"""Recovery: the layers that read pruned channels make up for them, by least squares and before any training.

Let x be what a layer reads in the masked model, and y what the same layer writes in the dense one, both for the same
calibration batches. Layers are mended in the order of execution, at their kept channels:

    (W, b)  <-  (W + dW, b + db),      min over dW, db of   sum |(W + dW) x + b + db - y|^2  +  lambda |dW|^2

x includes the errors and corrections of all earlier layers. Where a branch is added to a stream that a layer cannot change,
the last layer of the branch also makes up for the gap of the stream: it gets the target y + s_dense - s_masked, with s the
stream (`Family.residual_streams`). This also mends what removed blocks leave. The corrections are folded into the weights:
the model has the same layers and cost as before.

Sources: the update of the remaining weights when one is removed is that of Optimal Brain Surgeon (Hassibi and Stork, 1993),
with the Hessian of each layer's squared error as in SparseGPT (Frantar and Alistarh, arXiv 2301.00774). Reconstruction of the
outputs of the layer after pruned channels is that of ThiNet (Luo et al., arXiv 1707.06342).

Both models run side by side in one pass (`side_by_side`), in which each layer is mended before the next one runs, if all rows
fit into memory; otherwise one layer after another, with sums over several passes (`least_squares`).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..diffusion.batch import DiffusionBatch
from ..diffusion.schedulers import training_process
from ..distributed import mean_over_ranks, world_size
from ..families.lookup import family_of
from ..metrics.peak_memory import allocated_at_most
from ..precision import ieee_float32, own_forward
from .compaction import CompactionPlan, check_ema
from .least_squares import MAX_FEATURES, LeastSquares
from .masking import MASKS_MODULE, dense_parameters
from .side_by_side import Pair, side_by_side

__all__ = ["RIDGE", "ROWS", "recover", "recovery_bytes", "recovery_macs"]

RIDGE = 0.03  # lambda, relative to the mean squared feature
ROWS = 2**15  # that a layer reads at most, over all batches
ROWS_PER_FEATURE = 4  # where these are more
NO_GAP = 1e-5  # of the size of the outputs: rounding, so that the layer has nothing to mend
# Memory that a container may use, by version 2 and version 1 of cgroups
CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
PASS_BYTES = 4 * 2**30  # of a pass on the CPU, or a quarter of its memory if that is more

logger = logging.getLogger(__name__)


class _Done(Exception):
    """Ends a pass at the layer whose sums it was for."""


@torch.no_grad()
def recover(
    dense: nn.Module,
    masked: nn.Module,
    plan: CompactionPlan,
    batches: Sequence[DiffusionBatch],
    process,
    ridge: float = RIDGE,
    rows: int = ROWS,
    pass_bytes: int | None = None,
) -> dict[str, float]:
    """Mend the weights of a masked model in place.

    Args:
        dense: The dense model, on the same device.
        masked: The masked model. Masks are binary, or between 0 and 1 for units that are on their way out.
        plan: Its compaction plan, whose kept channels are mended.
        batches: Calibration batches; with several processes, the rows of this rank.
        process: Scheduler of the model, or its process.
        ridge: Penalty lambda on changes of weights, relative to the mean squared feature of the layer (> 0).
        rows: Number of rows (patches or tokens) that a layer reads at most, over all batches and processes (>= 1), or four
            for each feature if that is more.
        pass_bytes: Memory of a pass, in bytes (default: half of what is free on a GPU; on a CPU a quarter of its memory, at
            least 4 GiB). Batches are joined or split to meet it.

    Returns:
        For each mended layer by name, in the order of execution: the size of its gap before, relative to its outputs.

    Raises:
        ValueError: An argument is out of range, there is no batch, or the models do not have the same layers, or both masks.
    """
    if not 0 < ridge < math.inf:
        raise ValueError(f"ridge={ridge} must be a number greater than 0")
    if rows < 1:
        raise ValueError(f"rows={rows} must be at least 1")
    if not batches:
        raise ValueError("recovery needs at least one calibration batch")
    if hasattr(dense, MASKS_MODULE):
        raise ValueError("dense has channel masks: it must be a copy of the model from before its GradientFlowPruner was made")
    shapes = [{n: p.shape for n, p in dense_parameters(model).items()} for model in (dense, masked)]
    if shapes[0] != shapes[1]:
        name = next(iter(set(shapes[0].items()) ^ set(shapes[1].items())))[0]
        raise ValueError(f"the dense model must have the layers of the masked one: {name} differs")
    run = _Recovery(dense, masked, plan, ridge, rows)
    process = training_process(process)
    run.check_bytes(batches[0], process)
    limit = _memory(next(dense.parameters()).device) if pass_bytes is None else pass_bytes
    joined = _concatenate(batches).split(max(1, limit // run.bytes_of_a_row))
    device = next(masked.parameters()).device
    with (
        ieee_float32(),
        torch.autocast(device.type, enabled=False),
        own_forward(dense),
        own_forward(masked),
        torch.compiler.set_stance("force_eager"),  # compiled code leaves out the hooks that see inputs of layers
    ):
        run.mend(joined, process)
    return run.mended


@torch.no_grad()
def recover_averaged(
    dense: nn.Module, masked: nn.Module, ema, plan: CompactionPlan, batches: Sequence[DiffusionBatch], process, ridge: float
) -> dict[str, float]:
    """`recover`, with a Diffusers `EMAModel` of the masked model, whose averages change by as much as the weights.

    Raises:
        ValueError: As in `recover`, or the average belongs to another model.
    """
    check_ema(ema, masked)
    before = [parameter.detach().clone() for parameter in masked.parameters()]
    gaps = recover(dense, masked, plan, batches, process, ridge)
    for shadow, old, new in zip(ema.shadow_params, before, masked.parameters()):
        shadow += (new - old).to(shadow)
    return gaps


def recovery_macs(model: nn.Module, rows: int = ROWS) -> int:
    """MACs of the sums over features and their solution, at most, for a dense model.

    Args:
        model: The dense or masked model.
        rows: As in `recover`.
    """
    return sum(_rows(rows, size) * size * (size + outputs) + size**3 // 3 for size, outputs in _sizes(model))


def recovery_bytes(model: nn.Module) -> int:
    """Memory in bytes of the sums over features of a layer and of their solution, at most.

    Args:
        model: The dense or masked model.
    """
    return max((2 * 8 * size * (size + outputs) for size, outputs in _sizes(model)), default=0)  # float64, and a copy


def _sizes(model: nn.Module) -> Iterator[tuple[int, int]]:
    """Features at most, and outputs, of all layers that recovery may change.

    A kernel changes as a whole if few enough inputs are kept, however many the dense layer has.
    """
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            yield min(layer.weight[0].numel(), MAX_FEATURES), len(layer.weight)


def _rows(rows: int, size: int) -> int:
    """Rows of a layer with `size` features."""
    return max(rows, ROWS_PER_FEATURE * size)


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # blocks that PyTorch uses again
        return (torch.cuda.mem_get_info(device)[0] + cached) // 2
    try:  # not what is free now: passes, and with them the last bits of sums, are to be the same when a run is repeated
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not POSIX
        memory = 0
    for file in CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # there is none, or it is "max"
            memory = min(memory, int(Path(file).read_text()))
    return max(PASS_BYTES, memory // 4)


def _concatenate(batches: Sequence[DiffusionBatch]) -> DiffusionBatch:
    """All rows in one batch."""
    first = batches[0]
    tensors = [torch.cat(parts) for parts in zip(*(batch.tensors() for batch in batches))]
    return DiffusionBatch(*tensors[:3], dict(zip(first.conditioning, tensors[3:])))


class _Recovery:
    """State of one recovery."""

    def __init__(self, dense: nn.Module, masked: nn.Module, plan: CompactionPlan, ridge: float, rows: int) -> None:
        self.dense, self.masked, self.plan, self.ridge, self.rows = dense, masked, plan, ridge, rows
        self.parameters = dense_parameters(masked)
        self.streams: Mapping[str, tuple[str, str]] = family_of(dense).residual_streams(dense)
        self.device, self.dtype = next(dense.parameters()).device, next(dense.parameters()).dtype
        self.gaps: dict[tuple[str, str], Tensor] = {}
        self.mended: dict[str, float] = {}
        self.layers: list[str] = []
        self.seeds: tuple[int, ...] = ()  # of the images of this pass
        self.bytes_of_a_row = 1
        self.total_samples = 1

    def check_bytes(self, batch: DiffusionBatch, process) -> None:
        """Run one sample, to find the order of layers and the memory of a pass."""

        def visit(name: str, layer: nn.Module, pair: Pair) -> bool:
            self.layers.append(name)
            self._remember(name, layer, pair)
            return False

        sample = batch.split(1)[0]
        self.bytes_of_a_row = max(1, allocated_at_most(lambda: self._run(sample, process, visit), self.device))

    def mend(self, batches: Sequence[DiffusionBatch], process) -> None:
        """Mend all layers in the order of execution."""
        self.total_samples = world_size() * sum(len(batch) for batch in batches)
        if len(batches) == 1:

            def visit(name: str, layer: nn.Module, pair: Pair) -> bool:
                changed = False
                if self._can_mend(name, layer):
                    sums = self._sums(name, layer)
                    self._add(sums, name, layer, pair)
                    changed = self._fold(name, sums)
                self._remember(name, layer, pair)
                return changed

            self._run(batches[0], process, visit)
            return
        for name in self.layers:
            if self._can_mend(name, self.masked.get_submodule(name)):
                self._mend_layer(name, batches, process)

    def _mend_layer(self, mended: str, batches: Sequence[DiffusionBatch], process) -> None:
        """Mend one layer with sums over passes that end there."""
        sums = self._sums(mended, self.masked.get_submodule(mended))

        def visit(name: str, layer: nn.Module, pair: Pair) -> bool:
            if name == mended:
                self._add(sums, name, layer, pair)
                raise _Done
            self._remember(name, layer, pair)
            return False

        for batch in batches:
            try:
                self._run(batch, process, visit)
            except _Done:
                pass
        self._fold(mended, sums)

    def _run(self, batch: DiffusionBatch, process, visit: Callable[[str, nn.Module, Pair], bool]) -> None:
        self.seeds = batch.seeds()
        inputs = batch.to(self.device).inputs(process, self.dtype)
        try:
            with self._streams(), side_by_side(self.dense, self.masked, visit) as run:
                run(inputs)
        finally:
            self.gaps.clear()

    # --- one layer ---

    def _can_mend(self, name: str, layer: nn.Module) -> bool:
        if isinstance(layer, nn.Conv2d):
            usual = layer.groups == 1 and layer.padding_mode == "zeros"
        else:
            usual = isinstance(layer, nn.Linear)
        if not usual or f"{name}.weight" in self.plan.dropped:
            return False
        inputs = len(self._indices(name, 1))
        if inputs > MAX_FEATURES:
            logger.warning("%s reads %d channels, more than %d, and is left as it is by recovery", name, inputs, MAX_FEATURES)
        return inputs <= MAX_FEATURES

    def _indices(self, name: str, dim: int) -> Tensor:
        kept = self.plan.kept.get((f"{name}.weight", dim))
        weight = self.parameters[f"{name}.weight"]
        return torch.arange(weight.shape[dim], device=weight.device) if kept is None else kept.to(weight.device)

    def _sums(self, name: str, layer: nn.Module) -> LeastSquares:
        return LeastSquares(layer, self._indices(name, 1), self._indices(name, 0))

    def _add(self, sums: LeastSquares, name: str, layer: nn.Module, pair: Pair) -> None:
        gap = pair.dense_output - pair.masked_output
        if name in self.streams:
            gap = gap + _shaped(self.gaps[self.streams[name]], gap)
        rows = _rows(self.rows, len(sums.gram))
        sums.add(pair.masked_input, gap, pair.dense_output, max(1, rows // self.total_samples), self.seeds)

    def _fold(self, name: str, sums: LeastSquares) -> bool:
        """Add the changes to the parameters of a layer, if it has a gap. Returns whether it has."""
        gap = sums.reduce()
        if gap <= NO_GAP:
            return False
        changes = [change for change in sums.solve(self.ridge) if change is not None] if math.isfinite(gap) else []
        if not changes or not all(torch.isfinite(change).all() for change in changes):
            raise ValueError(
                f"recovery of {name} has values that are not finite (NaN or infinity): check the images, or take weights in "
                f"float32"
            )
        mean_over_ranks(changes)  # so that all processes have the same bits
        weight = self.parameters[f"{name}.weight"].data
        rows = weight[sums.outputs]
        rows[:, sums.inputs] += changes[0].to(weight.dtype)
        weight[sums.outputs] = rows
        if len(changes) > 1:
            bias = self.parameters[f"{name}.bias"].data
            bias[sums.outputs] += changes[1].to(bias.dtype)
        self.mended[name] = gap
        return True

    # --- streams ---

    def _remember(self, name: str, layer: nn.Module, pair: Pair) -> None:
        """Keep the gap that is left after a layer, if another layer is to make up for it."""
        if (name, "output") in self.streams.values():
            self.gaps[name, "output"] = pair.dense_output - layer(pair.masked_input)

    @contextmanager
    def _streams(self) -> Iterator[None]:
        """Context in which the gaps of streams are kept when they enter the block that adds to them."""

        def remember(name: str):
            def hook(_, args, kwargs):
                stream = args[0] if args else kwargs["hidden_states"]
                ours, theirs = stream.chunk(2)
                self.gaps[name, "input"] = ours - theirs

            return hook

        modules = dict(self.dense.named_modules())
        entered = {name for name, side in self.streams.values() if side == "input"}
        handles = [modules[name].register_forward_pre_hook(remember(name), with_kwargs=True) for name in sorted(entered)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _shaped(gap: Tensor, like: Tensor) -> Tensor:
    """A gap with the shape of a layer's output: attention writes images as tokens."""
    return gap.flatten(2).transpose(1, 2) if gap.ndim == 4 and like.ndim == 3 else gap
