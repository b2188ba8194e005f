"""The protocol of a *family*: all properties of one architecture that the package uses.

A family consists of a module in `families/` and a small class in `remote/`, the pruned class, which is saved with every pruned
model. All other modules treat a model as a `torch.nn.Module` with named layers, and use `lookup.family_of(model)` for:

| property | members |
|---|---|
| the dense and the pruned class | `dense_class`, `earlier_names`, `pruned_class` |
| the pipelines of the model, and its component name | `pipelines`, `component` |
| which configurations are supported | `check_arguments`, `check_supported`, `check_trainable` |
| in which processes and pipelines | `check_process`, `check_pipeline` |
| inputs for tracing and measuring | `example_inputs`, `tracing_size` |
| what pipelines use of an exported model | `output_class`, `attributes_for_pipelines` |
| calling the model | `output`, `predict`, `has_learned_variance`, `check_conditioning`, `class_labels`, `vector_size` |
| training mode without the model's own label dropout | `prepare_training` |
| layers that are never pruned | `boundary`, `never_pruned` |
| attention blocks | `attentions` |
| residual blocks, and those whose branch can be removed | `residual_blocks`, `removable_blocks` |
| streams that branches are added to | `residual_streams` |
| blocks whose outputs distillation compares | `block_outputs` |

The pruned class itself updates static attributes that depend on layer widths (`Upsample2D.channels`, ...), since it must work
without this package.

Every check raises a `ValueError` with the argument's name, its value and the accepted values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from diffusers import ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ..diffusion.batch import ModelInputs
from ..diffusion.class_labels import ClassLabels
from ..diffusion.process import DiffusionProcess

__all__ = ["Family"]


class Family(ABC):
    """Properties of one architecture. Families have no state: `lookup.FAMILIES` has one object for each.

    Attributes:
        dense_class: The class in Diffusers.
        earlier_names: Names that repositories from before `dense_class` give the class. The same files load as `dense_class`.
        pruned_class: Its subclass in `remote/`. Models of other subclasses belong to the family, too.
        output_class: Class that the model's `forward` returns.
        attention_class: Class of attention modules.
        component: Component name of the model in its pipelines.
        pipelines: Names of the supported pipelines.
        boundary: Layers with a side that is never pruned, since it is an input or output of the model: 0 for the input
            channels, 1 for the output channels.
        never_pruned: Further layers whose output channels are never pruned, although they could be.
    """

    dense_class: ClassVar[type[ModelMixin]]
    earlier_names: ClassVar[tuple[str, ...]] = ()
    pruned_class: ClassVar[type[ModelMixin]]
    output_class: ClassVar[type[BaseOutput]]
    attention_class: ClassVar[type[nn.Module]]
    component: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    boundary: ClassVar[Mapping[str, int]]
    never_pruned: ClassVar[frozenset[str]] = frozenset()

    def is_pruned(self, model: nn.Module) -> bool:
        """Whether a model is already pruned, with this class or a repository's copy of it."""
        return type(model).__name__ == self.pruned_class.__name__

    # --- configurations ---

    @abstractmethod
    def check_arguments(self, config: Mapping[str, Any]) -> None:
        """Check arguments of the dense class before the model is built: they must be valid, give finite outputs and limit
        memory.

        Args:
            config: All arguments of the dense class, by name, from an untrusted config.json.
        """

    def check_sample_size(self, config: Mapping[str, Any], size: int | tuple[int, int]) -> None:
        """Check a height and width that take the place of those of a valid configuration."""
        square = isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]
        plain = {name: value for name, value in config.items() if not name.startswith("_")}
        self.check_arguments({**plain, "sample_size": size[0] if square else size})

    @abstractmethod
    def check_supported(self, config: Mapping[str, Any]) -> None:
        """Check that a valid configuration can be pruned."""

    @abstractmethod
    def check_trainable(self, config: Mapping[str, Any]) -> None:
        """Check that the package has a training loss for a configuration. Messages complete "the model has ..."."""

    @abstractmethod
    def check_process(self, config: Mapping[str, Any], process: DiffusionProcess) -> None:
        """Check that a model can embed all timesteps of a process."""

    def check_pipeline(self, config: Mapping[str, Any], pipeline: str) -> None:
        """Check that a pipeline of this class name passes everything that the model takes."""
        if pipeline not in self.pipelines:
            raise ValueError(f"a {pipeline} has no {self.dense_class.__name__}; pipelines of it: {', '.join(self.pipelines)}")

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
        """Inputs of zeros for tracing, counting and timing, with conditioning if the model needs it.

        Args:
            model: The dense, masked or pruned model.
            height: Height of the sample.
            width: Width of the sample.
            batch_size: Number of samples (>= 1).
            device: Device of the inputs.
            dtype: Dtype of the sample, and of floating-point conditioning.
        """

    @abstractmethod
    def tracing_size(self, config: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width of a small sample for which no layer has an empty input."""

    @abstractmethod
    def check_conditioning(self, model: nn.Module, conditioning: Mapping[str, Tensor], size: int) -> None:
        """Check that conditioning for `size` samples is complete and supported by the model."""

    def class_labels(self, config: Mapping[str, Any]) -> ClassLabels | None:
        """Class labels of a model, which training data must have; None if it takes none.

        Raises:
            ValueError: The model takes other conditions than numbers of classes or vectors.
        """
        kind, count = config["class_embed_type"], config["num_class_embeds"]
        if kind not in (None, "identity"):
            raise ValueError(f"class_embed_type={kind} must be None or identity: class labels and vectors are supported")
        return None if count is None or kind is not None else ClassLabels(count)

    def vector_size(self, config: Mapping[str, Any]) -> int | None:
        """Number of values of the vector that the model takes as `class_labels`; None if it takes none."""
        return None

    def has_learned_variance(self, config: Mapping[str, Any]) -> bool:
        """Whether the model outputs twice the channels of its sample: the prediction, then the variances of sampling steps."""
        return config["out_channels"] == 2 * config["in_channels"]

    def output(self, model: Callable[..., Any], inputs: ModelInputs) -> Tensor:
        """All output channels of the model.

        Args:
            model: A model of the family, or a wrapper with the same arguments.
            inputs: Inputs on the model's device, with the sample in the model's dtype.

        Returns:
            Predictions in the dtype and shape of `inputs.sample`, followed by as many channels of learned variances if
            `has_learned_variance`.
        """
        return model(inputs.sample, inputs.timesteps, **inputs.conditioning).sample

    def predict(self, model: Callable[..., Any], inputs: ModelInputs) -> Tensor:
        """Predictions of the model: noise, samples or velocities, in the dtype and shape of `inputs.sample`.

        The arguments are those of `output`. Only learned variances are left out, so that a check of the shape finds a model
        with any other number of channels.
        """
        output, channels = self.output(model, inputs), inputs.sample.shape[1]
        return output[:, :channels] if output.shape[1] == 2 * channels else output

    def attributes_for_pipelines(self, config: Mapping[str, Any]) -> dict[str, object]:
        """Attributes by name that pipelines read from the model, beside its `config`, `dtype` and `device`."""
        return {}

    def prepare_training(self, model: nn.Module) -> nn.Module:
        """Switch off, in place, what a model does in training mode to its conditioning; returns the model."""
        return model

    # --- parts ---

    def attentions(self, model: nn.Module) -> dict[str, nn.Module]:
        """Attention blocks by name, in the model's order: each has linear layers `to_q`, `to_k`, `to_v` and `to_out[0]`, and
        an attribute `heads`."""
        return {name: module for name, module in model.named_modules() if isinstance(module, self.attention_class)}

    @abstractmethod
    def residual_blocks(self, model: nn.Module) -> dict[str, nn.Module]:
        """Residual blocks by name, in the model's order: each has a `dropout`."""

    @abstractmethod
    def removable_blocks(self, model: nn.Module) -> dict[str, tuple[str, ...]]:
        """Residual blocks whose branch can be removed, in the model's order: the names of the layers whose outputs the branch
        adds to the stream, by block name. Blocks are not nested. Without all of them, the model must still read its
        timestep and conditioning."""

    def residual_streams(self, model: nn.Module) -> dict[str, tuple[str, str]]:
        """Layers whose output is added to a stream as it is, and where the stream is found.

        Returns:
            By name of the layer: the name of another module, and `"input"` if the stream is the first argument of that module,
            or `"output"` if it is its output. The stream is known before the layer runs and has the shape of its output, up
            to an image as tokens. Layers that are missing here are right as well, but do not make up for their stream.
        """
        return {}

    @abstractmethod
    def block_outputs(self, model: nn.Module) -> dict[str, str]:
        """Blocks whose outputs are compared in distillation, in execution order: the name of the layer that produces the
        output channels, by block name."""

    def stream(self, output: Any) -> Tensor:
        """The stream of the sample in what a block of `block_outputs` returns."""
        return output[0] if isinstance(output, tuple) else output  # down blocks of UNets also return skips
