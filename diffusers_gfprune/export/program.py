"""The traced program of a denoiser: what all formats are made from.

`torch.export` traces the denoiser once, as a function of tensors (`runtimes.program`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..diffusion.batch import ModelInputs
from ..diffusion.schedulers import training_process
from ..metrics.model_size import spatial_size
from ..pipeline_parts import PipelineParts
from ..runtimes.program import TensorModel, to_tensors
from .description import TensorDescription

__all__ = ["MOST_SAMPLES", "describe_inputs", "random_inputs", "trace"]

# Diffusers' `Upsample2D` has a branch for 64 samples and more, so that a traced program holds for fewer only. The branch
# changes the memory format, and no value.
MOST_SAMPLES = 63
TRACED_SAMPLES = 2  # torch.export takes an axis of length 1 for a constant


def random_inputs(parts: PipelineParts, batch_size: int, timestep: float = 0, seed: int = 0) -> ModelInputs:
    """Noise and random conditioning, on the CPU.

    Args:
        parts: Parts of the pipeline; text encoders say how many tokens a prompt has.
        batch_size: Number of samples.
        timestep: Timestep of all samples.
        seed: Seed of all values.
    """
    family, denoiser = parts.family, parts.denoiser
    generator = torch.Generator().manual_seed(seed)
    labels = family.class_labels(denoiser.config) if parts.prompts is None else None
    zeros = family.example_inputs(denoiser, *spatial_size(denoiser), batch_size)
    conditioning = dict(zeros.conditioning)
    if parts.prompts is not None:
        conditioning |= {name: torch.zeros(batch_size, *shape) for name, shape in parts.prompts.shapes.items()}

    def values(name: str, like: Tensor) -> Tensor:
        if like.is_floating_point() and not name.endswith("_mask"):
            return torch.randn(like.shape, generator=generator)
        count = 2 if name.endswith("_mask") else 1 if labels is None else labels.count
        return torch.randint(0, count, like.shape, generator=generator)

    integers = training_process(parts.scheduler).has_integer_timesteps
    timesteps = torch.full((batch_size,), timestep, dtype=torch.int64 if integers else torch.float32)
    return ModelInputs(
        values("sample", zeros.sample), timesteps, {name: values(name, like) for name, like in conditioning.items()}
    )


def describe_inputs(inputs: Mapping[str, Tensor], batch_size: int | None) -> dict[str, TensorDescription]:
    """Dtypes and shapes of a program's inputs.

    Args:
        inputs: Example inputs.
        batch_size: Number of samples of every forward pass; None for any number.
    """
    return {
        name: TensorDescription(str(values.dtype).removeprefix("torch."), (batch_size, *values.shape[1:]))
        for name, values in inputs.items()
    }


@torch.no_grad()
def trace(parts: PipelineParts, denoiser: nn.Module, batch_size: int | None) -> torch.export.ExportedProgram:
    """Trace a denoiser.

    Args:
        parts: Parts of its pipeline.
        denoiser: The denoiser, or a copy in another dtype, on the CPU.
        batch_size: Number of samples of every forward pass; None for any number.
    """
    inputs = to_tensors(random_inputs(parts, batch_size or TRACED_SAMPLES))
    sample, timestep, *conditioning = inputs
    shapes = None
    if batch_size is None:
        axes = {0: torch.export.Dim("batch", min=1, max=MOST_SAMPLES)}
        shapes = {"sample": axes, "timestep": axes}
        if conditioning:
            shapes["conditioning"] = (axes,) * len(conditioning)
    model = TensorModel(denoiser, conditioning).eval()
    program = torch.export.export(model, tuple(inputs.values()), dynamic_shapes=shapes)
    remove_idle_squeezes(program.graph_module)
    return program


def remove_idle_squeezes(graph_module: torch.fx.GraphModule) -> None:
    """Remove calls of `squeeze(dim)` on axes that are longer than 1, in place.

    They do nothing in PyTorch, but onnxscript 0.7.2 writes them as ONNX's Squeeze, which refuses such axes. PixArt has one.
    """
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten.squeeze.dim:
            source, dim = node.args
            length = source.meta["val"].shape[dim]
            if isinstance(length, int) and length != 1:
                node.replace_all_uses_with(source)
                graph_module.graph.erase_node(node)
    graph_module.recompile()
