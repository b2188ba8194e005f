"""GFPrunedMixin: building, checking, loading and saving of pruned models (`pruned_layers` describes their configuration).

A pruned class is saved with its model as one self-contained file, whose text `GFPrunedMixin.source` returns.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import pathlib
import re
import typing
from collections.abc import Mapping, Sequence

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.activations import GEGLU, SwiGLU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from .pruned_layers import RemovedBlock, channels_of, materialize, narrow, remove_blocks

__all__ = ["GFPrunedMixin", "LoadingChecks", "accept_in_pipelines", "pruned_init"]

# Bytes. Weights of a mapped file are not aligned, and kernels sum them in another order; narrow layers are often affected.
ALIGNMENT = 64


class LoadingChecks:
    """Extension point for checks while loading a repository. They raise a ValueError; these ones do nothing.

    Users who run the copy of this file in a repository trust that repository. The installed package does not run code of
    repositories, and sets `checks` of the pruned class to its own checks on import.
    """

    def config_file(self, path: str) -> None:
        """Called before `config.json` is read."""

    def arguments(self, dense: Mapping) -> None:
        """Called before the model is built, with the arguments of the dense class."""

    def blocks(self, skeleton: nn.Module, removed_blocks: object) -> None:
        """Called before blocks of the dense model, which is on the meta device, are removed."""

    def tables(self, skeleton: nn.Module, tables: Mapping[str, Mapping]) -> None:
        """Called before the other tables narrow the layers of this model."""

    def weights(self, files: Sequence[str], dtype: torch.dtype, quantized: bool) -> None:
        """Called before weights are loaded, with their files, the dtype of the model, and whether they are quantized."""


class GFPrunedMixin:
    """Turns a class of Diffusers into a pruned one: `class Pruned(GFPrunedMixin, Stock)`.

    The mixin loads and saves the model with the four tables and checks its files. The class describes in `check_widths` how
    channels pass through its forward, gets its constructor from `pruned_init(Stock)`, and has `class_file = __file__`.
    """

    fourier_scale = 16.0  # of fresh random Fourier features
    class_file: str  # in which the class is defined; in a saved repository, this file
    _keys_to_ignore_on_load_unexpected = [r"\.to_(qkv|kv|added_qkv)\.(weight|bias)$"]  # copies, made by fuse_projections
    _auto_class = "AutoModel"  # config.json then names this file for AutoModel with trust_remote_code
    _card: str | None = None
    _replaced: tuple[pathlib.Path, pathlib.Path] | None = None  # the index that a save may write, and what it then replaces
    checks: LoadingChecks = LoadingChecks()

    def check_widths(self) -> None:
        """Raise a `ValueError` if the widths of consecutive layers do not match; uses `_through` and `_along`."""
        raise NotImplementedError  # a forward on the meta device is slow, and accepts a width of 1, which broadcasts

    def make_buffers(self, device: torch.device) -> None:
        """Make the buffers that are not saved with the weights, on `device`; until then they are on the meta device."""

    def _refuse(self, layer: nn.Module, problem: str) -> typing.NoReturn:
        name = next(name for name, module in self.named_modules() if module is layer)
        raise ValueError(f"the widths in the config do not fit together: {name} {problem}")

    def _through(self, channels: int, *layers: nn.Module, to: int | None = None) -> int:
        """Output channels of consecutive layers, given the input channels of the first; they must equal `to`, if given."""
        for layer in layers:
            reads, writes = channels_of(layer)
            if reads != channels:
                self._refuse(layer, f"has {reads} input channels, but must have {channels}")
            channels = writes
        if to not in (None, channels):
            self._refuse(layers[-1], f"has {channels} output channels, but must have {to}")
        return channels

    def _along(self, embedding: int, channels: int, *blocks: nn.Module | None, context: int | None = None) -> int:
        """Output channels of consecutive blocks.

        Args:
            embedding: Channels of the time embedding, which residual blocks read.
            channels: Input channels of the first block.
            *blocks: Residual blocks, transformers, attentions, feed-forward layers and samplers; None is left out.
            context: Channels of the keys' and values' input in cross-attentions.
        """
        for block in filter(None, blocks):
            if isinstance(block, RemovedBlock):
                channels = self._through(channels, *filter(None, [block.conv_shortcut]))
            elif isinstance(block, ResnetBlock2D):
                hidden = self._through(channels, block.norm1, block.conv1)
                wanted = 2 * hidden if block.time_embedding_norm == "scale_shift" else hidden
                self._through(embedding, block.time_emb_proj, to=wanted)
                residual = channels if block.conv_shortcut is None else self._through(channels, block.conv_shortcut)
                channels = self._through(hidden, block.norm2, block.conv2, to=residual)
            elif isinstance(block, Attention):
                inner = self._through(channels, *filter(None, [block.group_norm]), block.to_q)
                for layer in (block.to_k, block.to_v):
                    self._through(context if block.is_cross_attention else channels, layer, to=inner)
                channels = self._through(inner, block.to_out[0], to=channels)
            elif isinstance(block, Transformer2DModel):
                hidden = self._through(channels, block.norm, block.proj_in, to=block.inner_dim)  # layer norms have this width
                for layer in block.transformer_blocks:
                    if not isinstance(layer, RemovedBlock):
                        self._along(embedding, hidden, layer.attn1, layer.attn2, layer.ff, context=context)
                channels = self._through(hidden, block.proj_out, to=channels)
            elif isinstance(block, FeedForward):
                hidden = self._through(channels, block.net[0].proj)
                if isinstance(block.net[0], (GEGLU, SwiGLU)):  # values, then gates
                    if hidden % 2:
                        self._refuse(block.net[0].proj, f"has {hidden} output channels, but must have an even number")
                    hidden //= 2
                channels = self._through(hidden, block.net[2], to=channels)
            else:  # a sampler
                channels = self._through(channels, block.conv)
        return channels

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file, *args, **kwargs):
        cls.checks.config_file(json_file)
        return super()._dict_from_json_file(json_file, *args, **kwargs)

    @classmethod
    @functools.wraps(ModelMixin.from_pretrained.__func__)
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        if kwargs.pop("use_safetensors", True) is False or kwargs.get("use_flashpack"):
            raise ValueError("use_safetensors=False, use_flashpack=True: pruned models are loaded from safetensors only")
        device_map = kwargs.get("device_map")
        if not isinstance(device_map, Mapping) or "disk" not in device_map.values():
            kwargs.pop("offload_state_dict", None)  # Diffusers reloads such weights only if others stay on disk
        wants_info, name = kwargs.pop("output_loading_info", False), pretrained_model_name_or_path
        model, info = super().from_pretrained(name, use_safetensors=True, output_loading_info=True, **kwargs)
        # Diffusers only warns, and leaves such weights randomly initialized.
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if keys := sorted(map(str, info[problem])):
                problem = problem.replace("_", " ")
                raise ValueError(f"{name}: the weights do not fit the config: {len(keys)} {problem}, first {keys[0]}")
        for parameter in model.parameters():
            plain = type(parameter) is nn.Parameter and parameter.device.type == "cpu"
            if plain and parameter.data_ptr() % ALIGNMENT:
                parameter.data = parameter.data.clone()
        return (model, info) if wants_info else model

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, files, *args, **kwargs):
        dtype = kwargs.get("dtype") or next(model.parameters()).dtype
        cls.checks.weights(files, dtype, quantized=kwargs.get("hf_quantizer") is not None)
        return super()._load_pretrained_model(model, state_dict, files, *args, **kwargs)

    @classmethod
    def source(cls) -> str:
        """Text of the file that is saved with the model: `pruned_layers.py`, this file, then that of the class."""
        here, own = (pathlib.Path(file) for file in (__file__, cls.class_file))
        if own == here:  # this is such a file
            return own.read_text("utf-8")
        first, *others = (file.read_text("utf-8") for file in (here.with_name("pruned_layers.py"), here, own))
        imports = r"^from (?:__future__|\.pruned_\w+) import (?:\([^)]*\)|.*)\n"
        return "\n\n".join([first, *(re.sub(imports, "", text, flags=re.M) for text in others)])

    def to_json_string(self) -> str:
        # Do not publish where this copy was loaded from, which is often a local path.
        content = {key: value for key, value in json.loads(super().to_json_string()).items() if key != "_name_or_path"}
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

    @functools.wraps(ModelMixin.save_pretrained)
    def save_pretrained(self, save_directory, *args, **kwargs):
        given = inspect.signature(ModelMixin.save_pretrained).bind(self, save_directory, *args, **kwargs).arguments
        if not given.get("safe_serialization", True):
            raise ValueError("safe_serialization=False: pruned models are saved as safetensors only")
        folder = pathlib.Path(os.path.abspath(save_directory))
        is_main, self._replaced = given.get("is_main_process", True) and not folder.is_file(), None
        if is_main:
            # Before the weights, so that an upload by the base class includes this file.
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "diffusers_gfprune.py").write_bytes(self.source().encode())
            # Diffusers does not remove the index of an earlier, sharded save, and would load by it.
            variant = f".{given['variant']}" if given.get("variant") else ""
            index = folder / f"diffusion_pytorch_model.safetensors.index{variant}.json"
            index.unlink(missing_ok=True)
            self._replaced = index, folder / f"diffusion_pytorch_model{variant}.safetensors"
        card = folder / "README.md"
        self._card = card.read_text("utf-8") if card.is_file() else None
        alone = given.get("variant") or not is_main
        with contextlib.nullcontext() if alone else _variants_aside(folder):
            super().save_pretrained(save_directory, *args, **kwargs)
        self._remove_replaced()

    def _remove_replaced(self) -> None:
        """Remove the single file of an earlier save if this save has written shards: Diffusers loads by their index."""
        if self._replaced is not None and self._replaced[0].is_file():
            self._replaced[1].unlink(missing_ok=True)

    def _upload_folder(self, working_dir, *args, **kwargs):
        self._remove_replaced()
        if self._card is not None:  # Diffusers has just replaced it by a generic card
            pathlib.Path(working_dir, "README.md").write_text(self._card, "utf-8")
        return super()._upload_folder(working_dir, *args, **kwargs)


@contextlib.contextmanager
def _variants_aside(folder: pathlib.Path):
    """Context in which sharded weights of variants are in another folder: Diffusers deletes them before it saves others.

    Args:
        folder: An absolute path.
    """
    aside = folder.parent / f".{folder.name}.variants"  # left there by a process that was killed, they come back, too
    try:
        for path in folder.glob("diffusion_pytorch_model.*-of-*.safetensors"):
            aside.mkdir(exist_ok=True)
            path.rename(aside / path.name)
        yield
    finally:
        if aside.is_dir():
            for path in aside.iterdir():
                path.rename(folder / path.name)
            aside.rmdir()


def pruned_init(dense_class: type):
    """The constructor of a pruned class. It takes the arguments of the dense class, then the tables."""

    def __init__(
        self,
        *args,
        layer_channels: dict[str, tuple[int, int]] | None = None,
        norm_group_sizes: dict[str, list[int]] | None = None,
        attention_heads: dict[str, int] | None = None,
        removed_blocks: list[str] | None = None,
        **kwargs,
    ):
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        dense = {name: value for name, value in given.arguments.items() if name != "self"}
        tables = {"layer_channels": layer_channels, "norm_group_sizes": norm_group_sizes, "attention_heads": attention_heads}
        tables = {name: {} if table is None else table for name, table in tables.items()}
        self.checks.arguments(dense)
        device = nn.Linear(1, 1).weight.device  # the current default device, or meta while loading
        with torch.device("meta"):  # 1. the dense skeleton, without memory
            dense_class.__init__(self, **dense)
        removed_blocks = [] if removed_blocks is None else removed_blocks
        self.checks.blocks(self, removed_blocks)
        remove_blocks(self, removed_blocks)  # 2. the blocks and widths of the pruned model
        self.checks.tables(self, tables)
        narrow(self, **tables)
        self.check_widths()  # 3. check that they fit together
        self.make_buffers(torch.empty(0).device)  # Diffusers loads with parameters, not buffers, on the meta device
        if device.type != "meta":
            materialize(self, device)  # 4. fresh weights

    # Diffusers' configuration reads the arguments from this signature
    signature = inspect.signature(dense_class.__init__)
    own = [p for p in inspect.signature(__init__).parameters.values() if p.kind is p.KEYWORD_ONLY]
    own = [p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in own]
    __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *own])
    return register_to_config(__init__)


def accept_in_pipelines(pruned: type[ModelMixin], dense: type[ModelMixin]) -> None:
    """Make pipelines of Diffusers accept a pruned model wherever they accept the dense one.

    `from_pipe` keeps a component only if its exact class is in the annotation of the pipeline's argument.
    """
    stock = DiffusionPipeline._get_signature_types.__func__
    if not hasattr(stock, "accepted"):  # it is shared with other copies of this file

        @functools.wraps(stock)
        def types(cls):
            accepted = types.accepted
            return {name: (*kinds, *(p for p, d in accepted if d in kinds)) for name, kinds in stock(cls).items()}

        types.accepted = []
        DiffusionPipeline._get_signature_types = classmethod(types)
    DiffusionPipeline._get_signature_types.__func__.accepted.append((pruned, dense))
