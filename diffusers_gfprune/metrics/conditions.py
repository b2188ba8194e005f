"""Conditions of samples: class labels, vectors or prompts in turn, and what guidance needs.

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

__all__ = [
    *("SampleConditions", "conditions_of_vectors", "guided", "label_conditions", "row_conditions"),
    *("text_conditions", "vector_conditions"),
]


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


def vector_conditions(vectors: Tensor) -> SampleConditions:
    """Conditioning vectors in turn, for models that take them as `class_labels`.

    Args:
        vectors: Vectors of some images, such as held-out ones, floating point with shape `(n, size)`.
    """
    return SampleConditions(
        {"class_labels": vectors}, {}, {"num_vectors": len(vectors), "vectors": tensors_fingerprint({"vectors": vectors})}
    )


def conditions_of_vectors(given: Tensor | Callable[[range], Tensor] | None, count: int, size: int) -> SampleConditions:
    """Conditions of `count` images from vectors, or from a function of the numbers of images.

    Args:
        given: Floating point with shape `(n, size)`, in turn, or a function that returns them for a range of numbers.
        count: Number of images (>= 1).
        size: Number of values of the model's vectors.

    Raises:
        ValueError: There are none, or they have another dtype or shape.
    """
    if given is None:
        raise ValueError(
            f"class_labels=None must be vectors of {size} values, or a function that makes them: the model takes them"
        )
    vectors = torch.as_tensor(given(range(count)) if callable(given) else given)
    if not vectors.is_floating_point() or vectors.ndim != 2 or len(vectors) == 0 or vectors.shape[1] != size:
        raise ValueError(
            f"class_labels have shape {tuple(vectors.shape)}, {vectors.dtype}; the model takes vectors, floating point with "
            f"shape (images, {size})"
        )
    if not bool(vectors.isfinite().all()):
        raise ValueError("class_labels must be finite")
    return vector_conditions(vectors.detach().float().cpu())


def text_conditions(conditioning: Mapping[str, Tensor], null: Mapping[str, Tensor]) -> SampleConditions:
    """The prompts of some images in turn, such as held-out ones.

    Args:
        conditioning: Embeddings of the prompts by name, each with shape `(n, ...)`.
        null: Embeddings of "no prompt" by name, each with shape `(1, ...)`.
    """
    count = len(next(iter(conditioning.values())))
    fingerprint = tensors_fingerprint({**conditioning, **{f"null {name}": values for name, values in null.items()}})
    return SampleConditions(conditioning, null, {"num_prompts": count, "prompts": fingerprint})


def row_conditions(conditioning: Mapping[str, Tensor], null: Mapping[str, Tensor]) -> SampleConditions:
    """The captions or vectors of some images in turn, such as held-out ones.

    Args:
        conditioning: Conditioning by name, each with shape `(n, ...)`: embeddings of captions, or vectors as `class_labels`.
        null: Conditioning for "no prompt" by name, each with shape `(1, ...)`; empty for vectors.
    """
    if set(conditioning) == {"class_labels"}:
        return vector_conditions(conditioning["class_labels"])
    return text_conditions(conditioning, null)


def guided(
    predict: Callable[[ModelInputs], Tensor], inputs: ModelInputs, null: Mapping[str, Tensor], guidance_scale: float
) -> Tensor:
    """A prediction with classifier-free guidance. Both forward passes are one batch.

    Args:
        predict: Returns the prediction of a model for its inputs.
        inputs: Inputs with the conditions of the images.
        null: Conditioning with the same shapes for "no condition"; what it has not stays, such as the sizes of images.
        guidance_scale: The scale s; 1: no guidance, and one forward pass.
    """
    if guidance_scale == 1:
        return predict(inputs)
    doubled = {name: torch.cat([values, null.get(name, values)]) for name, values in inputs.conditioning.items()}
    both = ModelInputs(torch.cat([inputs.sample] * 2), torch.cat([inputs.timesteps] * 2), doubled)
    conditioned, unconditioned = predict(both).float().chunk(2)
    return unconditioned + guidance_scale * (conditioned - unconditioned)
