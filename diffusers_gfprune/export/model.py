"""Exported denoisers in Diffusers' pipelines.

pipe = DDPMPipeline(unet=load_exported("export"), scheduler=DDIMScheduler.from_pretrained("export", subfolder="scheduler"))
pipe = StableDiffusionPipeline.from_pretrained("runs/x", unet=load_exported("export"))
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from torch import Tensor

from ..errors import first_line
from ..families.lookup import family_named
from .description import ExportDescription
from .opening import Runner, open_export

__all__ = ["ExportedModel", "load_exported"]


class ExportedModel(ModelMixin, ConfigMixin):
    """A denoiser that a runtime executes on the CPU. Diffusers' pipelines use it like the model that was exported.

    Args:
        config: Configuration of the exported model.
        description: Content of `export.json`.
        runner: Function that the runtime executes.

    Attributes:
        config: Configuration of the exported model.
        description: Content of `export.json`.
        family: Family of the exported model.
    """

    config_name = "config.json"

    def __init__(self, config: Mapping[str, Any], description: ExportDescription, runner: Runner) -> None:
        super().__init__()
        self._internal_dict = FrozenDict(config)
        self.description, self.runner = description, runner
        self.family = family_named(description.model_class)
        for name, value in self.family.attributes_for_pipelines(config).items():
            setattr(self, name, value)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of samples and outputs: float32, whatever precision is inside."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Device of the output of a sample on the CPU; others are copied there and back."""
        return torch.device("cpu")

    @torch.no_grad()
    def forward(
        self,
        sample: Tensor | None = None,
        timestep: Tensor | float | None = None,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        return_dict: bool = True,
        **others,
    ):
        """Run the export.

        Args:
            sample: Noisy samples with shape `(batch, channels, height, width)`; transformers may be given them as
                `hidden_states`.
            timestep: One number, or one for each sample with shape `(batch,)`; whole numbers unless the process of the model
                has continuous noise levels.
            encoder_hidden_states: Embeddings of text with shape `(batch, tokens, channels)`, for models of text.
            class_labels: Labels with shape `(batch,)`, for models of classes.
            added_cond_kwargs: `text_embeds` and `time_ids` for SDXL, `resolution` and `aspect_ratio` for PixArt; None in it
                is left out.
            return_dict: Whether to return the output class of the exported model, instead of a tuple.
            **others: Further arguments of the exported model, such as `encoder_attention_mask`; those that the export does not
                take must be None.

        Returns:
            The output class of the exported model with its `sample`, in the dtype and on the device of `sample`.

        Raises:
            ValueError: The inputs are not those of the export.
        """
        given = {"encoder_hidden_states": encoder_hidden_states, "class_labels": class_labels, **others}
        given |= added_cond_kwargs or {}
        hidden_states = given.pop("hidden_states", None)
        sample = hidden_states if sample is None else sample
        if sample is None or timestep is None:
            raise ValueError(f"this export of a {self.description.model_class} needs a sample and a timestep")
        timesteps = torch.as_tensor(timestep)
        if timesteps.is_floating_point() and not self.description.inputs["timestep"].dtype.startswith("float"):
            if not bool((timesteps == timesteps.round()).all()):
                raise ValueError(f"timestep={timestep} must be whole: exports take the timesteps of training")
            timesteps = timesteps.long()
        named = {"sample": sample, "timestep": timesteps.expand(len(sample)) if timesteps.ndim == 0 else timesteps}
        named |= {name: values for name, values in given.items() if values is not None}
        output = self.runner(self._checked(named)).to(sample.device, sample.dtype)
        return self.family.output_class(sample=output) if return_dict else (output,)

    def _checked(self, named: Mapping[str, Any]) -> dict[str, Tensor]:
        """Inputs in their dtypes on the CPU, in the order of the export, after a check of names and shapes."""
        inputs, model = self.description.inputs, self.description.model_class
        if unknown := [name for name in named if name not in inputs]:
            raise ValueError(f"this export of a {model} takes {', '.join(inputs)}, not {unknown[0]}")
        if missing := [name for name in inputs if name not in named]:
            raise ValueError(f"this export of a {model} needs {missing[0]}")
        tensors = {}
        for name, expected in inputs.items():
            values = torch.as_tensor(named[name])
            batch = self.description.batch_size or len(named["sample"])
            wanted = (batch, *expected.shape[1:])
            if tuple(values.shape) != wanted:
                hint = "" if self.description.batch_size is None else "; export with batch dynamic for any number of samples"
                raise ValueError(f"{name} has shape {tuple(values.shape)}, but this export of a {model} takes {wanted}{hint}")
            tensors[name] = values.detach().to("cpu", getattr(torch, expected.dtype)).contiguous()
        return tensors

    def save_pretrained(self, *args, **kwargs) -> None:
        """Exports are not saved again.

        Raises:
            ValueError: Always.
        """
        raise ValueError("an exported model cannot be saved: copy the folder of the export")


def load_exported(
    folder: str | os.PathLike, *, trust_remote_code: bool = False, compiled: bool = False, **options: Any
) -> ExportedModel:
    """Load an export as a model for Diffusers' pipelines.

    Args:
        folder: Folder that `export_pipeline` wrote.
        trust_remote_code: Whether exports in the format `torch` may be loaded. Loading one can run code.
        compiled: Whether to run the program that AOTInductor compiled for the exporting machine; only in format `torch`.
        **options: Further arguments of the runtime: of `onnxruntime.InferenceSession`, `openvino.Core.compile_model`,
            `torch.export.load`, or `torch._inductor.aoti_load_package`.

    Returns:
        The exported denoiser.

    Raises:
        ImportError: The runtime is not installed.
        ValueError: The folder is not an export, or it is damaged, not trusted or of files that do not belong together.
    """
    folder = Path(folder)
    description = ExportDescription.load(folder)
    try:
        config = json.loads((folder / ExportedModel.config_name).read_text())
        matches = config["_class_name"] == description.model_class
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{folder / ExportedModel.config_name} cannot be read: {first_line(error)}") from error
    if not matches:
        raise ValueError(
            f"folder={folder} mixes two exports: config.json is of a {config['_class_name']}, export.json of a "
            f"{description.model_class}"
        )
    runner = open_export(folder, description, trust_remote_code=trust_remote_code, compiled=compiled, options=options)
    return ExportedModel(config, description, runner)
