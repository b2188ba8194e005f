"""Recovery in a run: least squares for the layers that read pruned channels, right before the model is compacted.

Targets are the layer outputs of the dense model (`pruning.recovery`). In one shot, nothing has been trained by then, and the
run starts from a model with most of the damage mended. After the two phases, masks have fallen to 0 while weights trained.

The images are those of calibration batches with further noise. Everything is a function of weights, masks, seed and step, so
that a resumed run does the same. Averaged weights change by as much as the weights; the optimizer keeps its moments.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..diffusion.batch import DiffusionBatch
from ..one_shot import recovery_batches
from .run_setup import Run
from .state import TrainingState

__all__ = ["recover_layers"]


def recover_layers(run: Run, state: TrainingState, batches: Sequence[DiffusionBatch]) -> None:
    """Mend the masked model. All processes must call this function.

    Args:
        run: The run, with the dense model.
        state: State with binary masks, before compaction; weights and averaged weights are changed in place.
        batches: This process's rows of calibration batches.
    """
    device, dense = run.accelerator.device, run.sample_quality.dense
    home = next(dense.parameters()).device
    dense.to(device)
    several = [batch.to(device) for batch in recovery_batches(batches, run.pipeline.process, run.args.run.seed + state.step)]
    state.pruner.recover(dense, several, ema=state.ema)
    dense.to(home)
