"""State of a run: model, optimizer, averaged weights, masks, step and curves, with compaction, saving and restoring.

All randomness in a run is a function of seed, step and rank (see `batches` and `seed_everything`), so the step determines the
state of all generators on every rank and the position in the data. Tensors are saved by the names that parameters have in the
dense model: masking and compaction change order and sizes, but not names.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from .. import GradientFlowPruner
from ..data.decoding import BrokenImages
from ..families.lookup import family_of
from ..objectives.objective import NoisePrediction
from ..pruning.masking import MASKS_MODULE, dense_name, dense_parameters
from .arguments import Arguments
from .checkpointing import Checkpoint
from .named_state import load_optimizer_state, load_tensors, optimizer_state
from .optimization_arguments import TrainingArguments
from .recovery import WeightPath
from .timestep_density import TimestepDensity

__all__ = ["Curves", "TrainingState", "make_lr_scheduler", "seed_everything"]


def seed_everything(seed: int, step: int, rank: int) -> None:
    """Seed all generators of this process for a step, so that dropout does not depend on where the run was resumed."""
    set_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


@dataclass
class Curves:
    """Curves recorded during the run."""

    train_steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    quality_steps: list[int] = field(default_factory=list)
    quality_seconds: list[float] = field(default_factory=list)  # training and scoring until then, without evaluation
    quality: dict[str, list[float | None]] = field(default_factory=dict)
    compaction: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("soft", "hard", "finetune", "scoring"), 0.0))


def _make_optimizer(args: Arguments, unet: nn.Module) -> torch.optim.Optimizer:
    t = args.training
    kind = torch.optim.AdamW
    if t.use_8bit_adam:
        from bitsandbytes.optim import AdamW8bit as kind
    return kind(
        unet.parameters(),
        lr=t.learning_rate,
        betas=(t.adam_beta1, t.adam_beta2),
        weight_decay=t.adam_weight_decay,
        eps=t.adam_epsilon,
    )


def make_lr_scheduler(args: TrainingArguments, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate schedule of a run. `constant` warms up, too, if it is asked to.

    `get_scheduler("constant", num_warmup_steps=...)` of Diffusers 0.42.1 leaves the warm-up out without a word.
    """
    warming = args.lr_scheduler == "constant" and args.lr_warmup_steps > 0
    return get_scheduler(
        "constant_with_warmup" if warming else args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )


def _buffers(unet: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers by dense name, without masks."""
    parameters = dense_parameters(unet)
    named = {dense_name(name): value for name, value in unet.state_dict().items() if not name.startswith(MASKS_MODULE)}
    return {name: value for name, value in named.items() if name not in parameters}


class TrainingState:
    """A run between two steps.

    Args:
        args: The command line.
        accelerator: Wraps model and optimizer.
        unet: The masked model of the pruner.
        pruner: The pruner, with masks attached.
        checkpoint: Checkpoint to resume from, if any.

    Attributes:
        step: Number of completed training steps.
        saved_step: Step of the last checkpoint.
        unet: The model, masked and later compacted; it is used for scoring, measuring, averaging and saving.
        model: The same model wrapped for training (autocast, several processes, compilation).
        optimizer: The optimizer, wrapped by Accelerate.
        lr_scheduler: Learning rate schedule of the optimizer.
        ema: The averaged weights, with `use_ema`.
        pruner: Masks and their history.
        curves: Recorded curves.
        diagnostics: Known failures of the method that were detected: `comparison`, `hessian_check`, `warnings`.
        recent: Losses since the last point of the loss curve.
        broken: Images that could not be read.
        weight_path: Changes by recovery that are being made, if any.
        timestep_density: Where timesteps are drawn, with `timestep_sampling="importance"`.
    """

    def __init__(
        self,
        args: Arguments,
        accelerator: Accelerator,
        unet: nn.Module,
        pruner: GradientFlowPruner,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.args, self.accelerator, self.pruner = args, accelerator, pruner
        self.step = 0
        self.saved_step: int | None = None
        self.curves = Curves()
        self.diagnostics: dict = {"comparison": None, "hessian_check": None, "warnings": []}
        self.recent: list[Tensor | float] = []
        self.broken = BrokenImages(args.data.max_broken_images)
        self.weight_path: WeightPath | None = None
        self.timestep_density: TimestepDensity | None = None
        if args.training.timestep_sampling == "importance":
            self.timestep_density = TimestepDensity(accelerator.device)
        if checkpoint is not None:
            pruner.load_state_dict({"tensors": checkpoint.tensors["pruner"], "values": checkpoint.values["pruner"]})
            if checkpoint.values["compacted_config"] is not None:
                unet = family_of(unet).pruned_class.from_config(checkpoint.values["compacted_config"])
        self._adopt(unet)
        t = args.training
        base = _make_optimizer(args, unet)
        self.lr_scheduler = make_lr_scheduler(t, base)
        self.ema = None
        if t.use_ema:
            self.ema = EMAModel(unet.parameters(), decay=t.ema_max_decay, use_ema_warmup=True, power=0.75)
            self.ema.to(accelerator.device)
        if checkpoint is not None:
            try:
                self._restore(checkpoint, base)
            except (KeyError, TypeError, RuntimeError) as error:  # complete, but from a run of another kind
                raise ValueError(f"{checkpoint.path} does not fit this run: {error!r}") from error
        self._wrap(base)

    @property
    def compacted(self) -> bool:
        """Whether the model has its final size."""
        return family_of(self.unet).is_pruned(self.unet)

    @property
    def phase(self) -> str:
        """Phase of the next step: `"soft"`, `"hard"` or `"finetune"`."""
        return "finetune" if self.pruner.finished else self.pruner.schedule.phase(self.step)

    def _adopt(self, unet: nn.Module) -> None:
        """Make `unet` the model: move it to the device, set its memory format and train mode."""
        self.unet = family_of(unet).prepare_training(unet.to(self.accelerator.device).train().requires_grad_(True))
        if self.args.training.dropout is not None:
            for block in family_of(self.unet).residual_blocks(self.unet).values():
                block.dropout.p = self.args.training.dropout
        if self.args.precision.channels_last:
            self.unet.to(memory_format=torch.channels_last)
        if self.args.precision.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()

    def _wrap(self, base: torch.optim.Optimizer) -> None:
        """Wrap model and optimizer with Accelerate.

        The UNet is not passed directly: `prepare` replaces the forward of its argument by one under autocast, which would
        affect scores and measurements, too.
        """
        self.accelerator.free_memory()  # drops the wrappers from before compaction
        features = self.args.objective.needs_features
        self.model = self.accelerator.prepare_model(NoisePrediction(self.unet, features=features))
        # Device placement would move AdamW's step counters to the GPU, where reading them synchronizes.
        self.optimizer = self.accelerator.prepare_optimizer(base, device_placement=False)

    def compact(self) -> None:
        """Replace the model by the compacted one. Optimizer state and average are carried over; wrappers are recreated."""
        small = self.pruner.compact(optimizer=self.optimizer.optimizer, ema=self.ema)
        self.pruner.unet.to("cpu")  # its weights are not needed any more, its masks are
        self.pruner.unet.channel_masks.to(self.accelerator.device)
        self._adopt(small)
        self._lay_out(self.optimizer.optimizer)
        self._wrap(self.optimizer.optimizer)

    def _lay_out(self, base: torch.optim.Optimizer) -> None:
        """Move optimizer state and average to the device and memory format of their parameters.

        The last bit of a sum may depend on the memory format, in which a resumed run must not differ.
        """

        def like(parameter: Tensor, value: Tensor) -> Tensor:
            return torch.empty_like(parameter, dtype=value.dtype).copy_(value)

        for parameter, state in base.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.ndim > 0:
                    fits = value.shape == parameter.shape
                    state[key] = like(parameter, value) if fits else value.to(parameter.device)
        if self.ema is not None:
            shadows = zip(self.unet.parameters(), self.ema.shadow_params)
            self.ema.shadow_params = [like(parameter, shadow) for parameter, shadow in shadows]

    @contextlib.contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Context in which the model has the averaged weights, if there are any."""
        if self.ema is None:
            yield self.unet
            return
        self.ema.store(self.unet.parameters())
        self.ema.copy_to(self.unet.parameters())
        try:
            yield self.unet
        finally:
            self.ema.restore(self.unet.parameters())

    # --- saved and restored ---

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensors of a checkpoint, by part and name."""
        parameters = dense_parameters(self.unet)
        parts = {
            "model": {**parameters, **_buffers(self.unet)},
            "optimizer": optimizer_state(self.optimizer.optimizer, parameters)[0],
            "pruner": self.pruner.state_dict()["tensors"],
        }
        if self.ema is not None:
            parts["ema"] = dict(zip(parameters, self.ema.shadow_params))
        if self.weight_path is not None:
            parts["recovery"] = self.weight_path.changes
        return parts

    def values(self) -> dict:
        """JSON values of a checkpoint."""
        scaler = self.accelerator.scaler
        config = {name: value for name, value in self.unet.config.items() if not name.startswith("_")}
        return {
            "compacted_config": config if self.compacted else None,
            "optimizer": optimizer_state(self.optimizer.optimizer, dense_parameters(self.unet))[1],
            "lr_scheduler_steps": self.lr_scheduler.last_epoch,
            "scaler": None if scaler is None else scaler.state_dict(),
            "ema_steps": None if self.ema is None else self.ema.optimization_step,
            "pruner": self.pruner.state_dict()["values"],
            "curves": asdict(self.curves),
            "diagnostics": self.diagnostics,
            "recovery": None if self.weight_path is None else self.weight_path.values(),
            "timestep_density": None if self.timestep_density is None else self.timestep_density.values(),
            "recent": [float(loss) for loss in self.recent],
            "broken": self.broken.to_list(),
        }

    def _restore(self, checkpoint: Checkpoint, base: torch.optim.Optimizer) -> None:
        """Restore the state of a checkpoint.

        Raises:
            ValueError: The checkpoint holds other weights.
        """
        values, tensors = checkpoint.values, checkpoint.tensors
        parameters = dense_parameters(self.unet)
        load_tensors(checkpoint.path, "weights", tensors["model"], {**parameters, **_buffers(self.unet)})
        load_optimizer_state(base, parameters, tensors["optimizer"], values["optimizer"])
        self.lr_scheduler.last_epoch = values["lr_scheduler_steps"] - 1
        with warnings.catch_warnings():  # of a scheduler that steps before its optimizer
            warnings.simplefilter("ignore", UserWarning)
            self.lr_scheduler.step()
        if self.ema is not None:
            shadows = dict(zip(parameters, self.ema.shadow_params))
            load_tensors(checkpoint.path, "averaged weights", tensors["ema"], shadows)
            self.ema.optimization_step = values["ema_steps"]
        if self.accelerator.scaler is not None and values["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(values["scaler"])
        self.curves, self.diagnostics = Curves(**values["curves"]), values["diagnostics"]
        self.recent = list(values["recent"])
        self.broken.add(values["broken"])
        if values.get("recovery") is not None:  # absent from older checkpoints
            changes = {name: torch.empty_like(parameters[name]).copy_(t) for name, t in tensors["recovery"].items()}
            self.weight_path = WeightPath(**values["recovery"], changes=changes)
        if self.timestep_density is not None and values.get("timestep_density") is not None:  # another setting, or older
            self.timestep_density.restore(values["timestep_density"])
        self.step = self.saved_step = checkpoint.step
        self._lay_out(base)
