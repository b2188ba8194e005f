"""The protocol of a *family*: everything about one architecture that the rest of the package needs to know.

A family is one module in `families/`, and one small class in `remote/`, the pruned class, which is saved with every pruned
model. All other modules see a model as a `torch.nn.Module` with named layers, and ask `lookup.family_of(model)` for:

| what | where |
|---|---|
| the dense and the pruned class | `dense_class`, `pruned_class` |
| the pipelines it lives in, and its name there | `pipelines`, `component` |
| which configurations are supported | `check_arguments`, `check_supported`, `check_trainable`, `check_timesteps` |
| inputs for a trace or a measurement | `example_inputs`, `tracing_size` |
| how the model is called | `predict`, `check_conditioning` |
| layers that are never pruned | `boundary`, `never_pruned` |
| attention blocks | `attentions` |
| residual blocks | `residual_blocks` |
| blocks whose outputs distillation compares | `block_outputs` |

The pruned class itself knows which static attributes follow the widths of layers (`Upsample2D.channels`, ...), since it must
work where this package is not installed.

Every check raises a `ValueError` with the argument's name, its value and what would be right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from ..diffusion.batch import ModelInputs

__all__ = ["Family"]


class Family(ABC):
    """What is known of one architecture. It has no state: there is one object of each family, in `lookup.FAMILIES`.

    Attributes:
        dense_class: The stock class.
        pruned_class: Its subclass in `remote/`. Models of other subclasses belong to the family, too.
        attention_class: Of the modules that are attentions.
        component: Name of the model in its pipelines.
        pipelines: Names of the pipelines that can be pruned.
        boundary: Layers with a side that is never narrowed, since it meets what is not the model's: 0 for the input channels,
            1 for the output channels.
    """

    dense_class: ClassVar[type[ModelMixin]]
    pruned_class: ClassVar[type[ModelMixin]]
    attention_class: ClassVar[type[nn.Module]]
    component: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    boundary: ClassVar[Mapping[str, int]]

    def is_pruned(self, model: nn.Module) -> bool:
        """Whether a model is pruned already; a repository's own copy of the pruned class counts."""
        return type(model).__name__ == self.pruned_class.__name__

    # --- configurations ---

    @abstractmethod
    def check_arguments(self, config: Mapping[str, Any]) -> None:
        """Refuse arguments of the dense class that could not be built, would compute no number, or would allocate without
        bound. Nothing is built before.

        Args:
            config: All arguments of the dense class, by name, as a config.json of unknown origin has them.
        """

    @abstractmethod
    def check_supported(self, config: Mapping[str, Any]) -> None:
        """Refuse a configuration that can be built, but not pruned."""

    @abstractmethod
    def check_trainable(self, config: Mapping[str, Any]) -> None:
        """Refuse a configuration that no training loss of the package suits. Messages complete "the model has ..."."""

    @abstractmethod
    def check_timesteps(self, config: Mapping[str, Any], num_train_timesteps: int) -> None:
        """Refuse a model that cannot embed some timestep of a process with `num_train_timesteps` (>= 1)."""

    # --- inputs and outputs ---

    @abstractmethod
    def example_inputs(
        self,
        model: nn.Module,
        height: int,
        width: int,
        batch_size: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> ModelInputs:
        """Inputs of a forward, for tracing, counting and timing: zeros, with conditioning where the model wants some.

        Args:
            model: Dense, masked or pruned.
            height: Of the sample.
            width: Of the sample.
            batch_size: Samples (>= 1).
            device: Where the inputs lie.
            dtype: Of the sample, and of floating-point conditioning.
        """

    @abstractmethod
    def tracing_size(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width of a small sample that every layer gets something of."""

    @abstractmethod
    def check_conditioning(self, model: nn.Module, conditioning: Mapping[str, Tensor], size: int) -> None:
        """Refuse conditioning that the model does not take, or that is missing, for `size` samples."""

    def predict(self, model: Callable[..., Any], inputs: ModelInputs) -> Tensor:
        """What the model predicts: noise, samples or velocities, in the dtype and shape of `inputs.sample`.

        Args:
            model: A model of the family, or a wrapper with the same arguments.
            inputs: On the model's device, the sample in its dtype.
        """
        return model(inputs.sample, inputs.timesteps, **inputs.conditioning).sample

    # --- parts ---

    @abstractmethod
    def never_pruned(self, config: Mapping[str, Any]) -> frozenset[str]:
        """Names of the layers whose output channels are never pruned."""

    def attentions(self, model: nn.Module) -> dict[str, nn.Module]:
        """Attention blocks by name, in the model's order: each has linear layers `to_q`, `to_k`, `to_v` and `to_out[0]`, and
        a number of `heads`."""
        return {name: module for name, module in model.named_modules() if isinstance(module, self.attention_class)}

    @abstractmethod
    def residual_blocks(self, model: nn.Module) -> dict[str, nn.Module]:
        """Blocks that add to the stream, by name, in the model's order: each has a `dropout`."""

    @abstractmethod
    def block_outputs(self, model: nn.Module) -> dict[str, str]:
        """Blocks whose outputs are compared in distillation, in the order that they run in: by name of the block, the name of
        the layer that its output channels come from."""
