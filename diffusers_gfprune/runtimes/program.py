"""A denoiser as a function of tensors: what all exports are made from.

    sample (batch, channels, height, width), timestep (batch,), conditioning ...  ->  out_sample

Samples and embeddings are float32, timesteps and labels int64. Timesteps are float32 if the model's process has continuous
noise levels. Weights may have another dtype: the function converts.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..diffusion.batch import ModelInputs
from ..families.lookup import family_of

__all__ = ["OUTPUT", "TensorModel", "to_tensors"]

OUTPUT = "out_sample"


class TensorModel(nn.Module):
    """A denoiser that takes and returns tensors.

    Args:
        denoiser: The denoiser.
        names: Names of its conditioning.
    """

    def __init__(self, denoiser: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.denoiser, self.names, self.family = denoiser, tuple(names), family_of(denoiser)

    def forward(self, sample: Tensor, timestep: Tensor, *conditioning: Tensor) -> Tensor:
        """All output channels in float32; see the module docstring for the arguments."""
        dtype = self.denoiser.dtype
        converted = [values.to(dtype) if values.is_floating_point() else values for values in conditioning]
        inputs = ModelInputs(sample.to(dtype), timestep, dict(zip(self.names, converted)))
        return self.family.output(self.denoiser, inputs).float()


def to_tensors(inputs: ModelInputs) -> dict[str, Tensor]:
    """Inputs by name, in the order of a program: floating point as float32, integers as int64."""
    named = {"sample": inputs.sample, "timestep": inputs.timesteps, **inputs.conditioning}
    return {name: values.float() if values.is_floating_point() else values.long() for name, values in named.items()}
