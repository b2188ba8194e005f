"""Conditions of samples: class labels or prompts in turn, and what guidance needs.

Image number i has row i mod n of n conditions, so that its condition depends on its number only. Classifier-free guidance (Ho
and Salimans, arXiv 2207.12598) with the scale s samples with

    e = e(x_t, null) + s (e(x_t, c) - e(x_t, null)),

where the null condition means "no label" or "no prompt". With s = 1, this is the prediction for c alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..diffusion.batch import ModelInputs
from ..diffusion.class_labels import ClassLabels
from ..fingerprints import tensors_fingerprint

__all__ = ["SampleConditions", "guided", "label_conditions", "text_conditions"]


@dataclass(frozen=True)
class SampleConditions:
    """What samples are conditioned on.

    Attributes:
        rows: Conditioning by name, each with shape `(n, ...)`, on the CPU; empty for unconditional models.
        null: Conditioning for "no condition" by name, each with shape `(1, ...)`; empty if the model has none.
        description: Everything that the rows depend on, as JSON values for result files and cache keys.
    """

    rows: Mapping[str, Tensor] = field(default_factory=dict)
    null: Mapping[str, Tensor] = field(default_factory=dict)
    description: Mapping[str, object] = field(default_factory=dict)

    def of(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Conditioning of images by their numbers."""
        order = torch.tensor(list(numbers), dtype=torch.long)
        return {name: values[order % len(values)] for name, values in self.rows.items()}

    def without(self, count: int) -> dict[str, Tensor]:
        """Null conditioning of `count` images."""
        return {name: values.expand(count, *values.shape[1:]) for name, values in self.null.items()}

    def check_guidance(self, guidance_scale: float) -> None:
        """Check that a guidance scale can be used.

        Raises:
            ValueError: The model has no null condition.
        """
        if guidance_scale != 1 and not self.null:
            what = "is unconditional" if not self.rows else "has no null label"
            raise ValueError(f"guidance_scale={guidance_scale:g} must be 1: the model {what}")


def label_conditions(labels: ClassLabels | None, null_label: int | None = None) -> SampleConditions:
    """The classes of a model in turn.

    Args:
        labels: Class labels of the model; None: it is unconditional.
        null_label: The label for "no label" (default: that of the architecture, if it has one). No sample has it.
    """
    if labels is None:
        return SampleConditions()
    null_label = labels.null_label if null_label is None else null_label
    classes = torch.tensor([label for label in range(labels.count) if label != null_label])
    null = {} if null_label is None else {"class_labels": torch.tensor([null_label])}
    return SampleConditions({"class_labels": classes}, null)


def text_conditions(conditioning: Mapping[str, Tensor], null: Mapping[str, Tensor]) -> SampleConditions:
    """The prompts of some images in turn, such as held-out ones.

    Args:
        conditioning: Embeddings of the prompts by name, each with shape `(n, ...)`.
        null: Embeddings of "no prompt" by name, each with shape `(1, ...)`.
    """
    count = len(next(iter(conditioning.values())))
    fingerprint = tensors_fingerprint({**conditioning, **{f"null {name}": values for name, values in null.items()}})
    return SampleConditions(conditioning, null, {"num_prompts": count, "prompts": fingerprint})


def guided(
    predict: Callable[[ModelInputs], Tensor], inputs: ModelInputs, null: Mapping[str, Tensor], guidance_scale: float
) -> Tensor:
    """A prediction with classifier-free guidance. Both forward passes are one batch.

    Args:
        predict: Returns the prediction of a model for its inputs.
        inputs: Inputs with the conditions of the images.
        null: Conditioning with the same shapes for "no condition".
        guidance_scale: The scale s; 1: no guidance, and one forward pass.
    """
    if guidance_scale == 1:
        return predict(inputs)
    doubled = {name: torch.cat([values, null[name]]) for name, values in inputs.conditioning.items()}
    both = ModelInputs(torch.cat([inputs.sample] * 2), torch.cat([inputs.timesteps] * 2), doubled)
    conditioned, unconditioned = predict(both).float().chunk(2)
    return unconditioned + guidance_scale * (conditioned - unconditioned)
