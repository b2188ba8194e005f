"""GFPrunedUNet2DModel: a `UNet2DModel` whose layers have the widths that pruning left.

The configuration is that of the dense model plus three tables, so that `from_pretrained` builds the small model straight
from `config.json`:

    layer_channels     {"down_blocks.0.resnets.0.conv1": [48, 24], ...}    input and output channels of a layer
    norm_group_sizes   {"down_blocks.0.resnets.0.norm2": [4, 4, 4, ...]}   channels in each norm group
    attention_heads    {"down_blocks.1.attentions.0": 3}                   heads that are left

A layer that a table does not name is as wide as in the dense model. A kept channel `c` stays in the norm group `g` that it
was trained in (https://arxiv.org/abs/1803.08494): `y_c = gamma_c (x_c - mean_g) / sqrt(var_g + eps) + beta_c`. Groups of equal
size are those of an `nn.GroupNorm`; others, which an earlier version of pruning left, those of a `RaggedGroupNorm`.

This one file is the whole model: it travels inside saved folders as `diffusers_gfprune.py`, and imports nothing but the
standard library, torch and Diffusers.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import pathlib
import shutil
import typing
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, zip_longest

import diffusers
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import GaussianFourierProjection, TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

__all__ = ["GFPrunedUNet2DModel", "RaggedGroupNorm"]


class RaggedGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` whose groups may differ in size: a native norm of each group.

    Args:
        group_sizes: Channels in each group, in order (each >= 1).
        eps: Added to the variance (> 0).
    """

    def __init__(self, group_sizes: Sequence[int], eps: float = 1e-5, device=None) -> None:
        super().__init__(1, sum(group_sizes), eps, device=device)  # one group, by which any number of channels can be divided
        self.num_groups, self.group_sizes = len(group_sizes), tuple(group_sizes)

    def forward(self, input: Tensor) -> Tensor:
        # (batch, channels, *) in groups; the native kernel takes statistics of half precision in float32
        groups = zip(*(tensor.split(self.group_sizes, dim) for tensor, dim in ((input, 1), (self.weight, 0), (self.bias, 0))))
        return torch.cat([F.group_norm(x, 1, gamma, beta, self.eps) for x, gamma, beta in groups], dim=1)

    def extra_repr(self) -> str:
        return f"group_sizes={list(self.group_sizes)}, eps={self.eps}"


class LoadingChecks:
    """The extension point of this file: what is refused of a repository, by a ValueError, and when. Here, nothing.

    Who runs the copy of this file in a repository trusts that repository. Who has the package need not: it runs no code of
    repositories, and puts checks of its own into `GFPrunedUNet2DModel.checks` on import.
    """

    def config_file(self, path: str) -> None:
        """Before `config.json` is read."""

    def arguments(self, dense: Mapping) -> None:
        """Before anything is built: the arguments that are those of `UNet2DModel`."""

    def tables(self, skeleton: UNet2DModel, tables: Mapping[str, Mapping]) -> None:
        """Before the tables narrow the dense model, which is on the meta device."""

    def weights(self, files: Sequence[str], dtype: torch.dtype, quantized: bool) -> None:
        """Before weights are loaded: the files, what becomes of them, and whether they are quantized."""


# --- widths ------------------------------------------------------------------------------------------------------------


def _channels(layer: nn.Module) -> tuple[int, int]:
    """Channels that a layer reads and writes."""
    if isinstance(layer, nn.GroupNorm):
        return layer.num_channels, layer.num_channels
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    return (layer.in_channels, layer.out_channels) if isinstance(layer, nn.Conv2d) else (layer.in_features, layer.out_features)


def _narrow_layer(layer: nn.Module, reads: int, writes: int) -> None:
    shape = (writes, reads, *layer.weight.shape[2:])
    if isinstance(layer, nn.Embedding):
        layer.num_embeddings, layer.embedding_dim = shape = (reads, writes)
    elif isinstance(layer, nn.Conv2d):
        layer.in_channels, layer.out_channels = reads, writes
    else:
        layer.in_features, layer.out_features = reads, writes
    layer.weight.data = torch.empty(shape, device="meta")
    if getattr(layer, "bias", None) is not None:
        layer.bias.data = torch.empty(writes, device="meta")


def _narrow(unet: UNet2DModel, layer_channels: Mapping, norm_group_sizes: Mapping, attention_heads: Mapping) -> None:
    """Give a dense model without memory the widths of the tables, in place: to make its layers anew takes much longer."""
    modules = dict(unet.named_modules())
    for name, channels in layer_channels.items():
        _narrow_layer(modules[name], *channels)
    for name, sizes in norm_group_sizes.items():
        norm = modules[name]
        if len(set(sizes)) > 1:
            unet.set_submodule(name, RaggedGroupNorm(sizes, norm.eps, "meta"))
        else:
            norm.num_groups, norm.num_channels = len(sizes), sum(sizes)
            norm.weight.data, norm.bias.data = (torch.empty(sum(sizes), device="meta") for _ in range(2))
    for name, module in modules.items():
        if isinstance(module, ResnetBlock2D):
            module.in_channels, module.out_channels = module.conv1.in_channels, module.conv2.out_channels
            for sampler in filter(None, (module.upsample, module.downsample)):
                sampler.channels = sampler.out_channels = module.in_channels
        elif isinstance(module, (Upsample2D, Downsample2D)) and isinstance(module.conv, nn.Conv2d):
            module.channels, module.out_channels = _channels(module.conv)
        elif isinstance(module, Attention):
            module.heads = module.sliceable_head_dim = attention_heads.get(name, module.heads)
            module.inner_dim = module.inner_kv_dim = module.to_q.out_features
            module.query_dim = module.cross_attention_dim = module.to_q.in_features
            module.out_dim = module.out_context_dim = module.to_out[0].out_features
            module.scale = (module.inner_dim // module.heads) ** -0.5


def _check_widths(unet: UNet2DModel) -> None:
    """Follow the channels through `UNet2DModel.forward`: each layer must read as many as the one before it writes.

    A forward on the meta device takes a hundred times as long, and takes a width of 1, which broadcasts, for any other.
    """

    def through(channels: int, *layers: nn.Module, to: int | None = None) -> int:
        """From the channels that go into the first layer to those that come out of the last, which must be `to`."""
        for layer in layers:
            reads, writes = _channels(layer)
            if reads != channels:
                refuse(layer, f"reads {reads} channels where there are {channels}")
            channels = writes
        if to not in (None, channels):
            refuse(layers[-1], f"writes {channels} channels where {to} are wanted")
        return channels

    def refuse(layer: nn.Module, problem: str) -> None:
        name = next(name for name, module in unet.named_modules() if module is layer)
        raise ValueError(f"the widths in the config do not fit together: {name} {problem}")

    def resnet(block: ResnetBlock2D, channels: int) -> int:
        hidden = through(channels, block.norm1, block.conv1)
        through(embedding, block.time_emb_proj, to=hidden * (2 if block.time_embedding_norm == "scale_shift" else 1))
        residual = channels if block.conv_shortcut is None else through(channels, block.conv_shortcut)
        return through(hidden, block.norm2, block.conv2, to=residual)

    def attention(block: Attention, channels: int) -> int:
        inner = through(channels, *filter(None, [block.group_norm]), block.to_q)
        through(channels, block.to_k, to=inner)
        through(channels, block.to_v, to=inner)
        return through(inner, block.to_out[0], to=channels)

    def along(channels: int, *layers: nn.Module | None) -> int:
        for layer in layers:
            if isinstance(layer, ResnetBlock2D):
                channels = resnet(layer, channels)
            elif isinstance(layer, Attention):
                channels = attention(layer, channels)
            elif layer is not None:
                channels = through(channels, layer.conv)  # of a sampler
        return channels

    def pairs(block: nn.Module) -> Iterator[tuple[ResnetBlock2D, Attention | None]]:
        return zip_longest(block.resnets, getattr(block, "attentions", ()))

    # 1. time and class
    first, kind = unet.config.block_out_channels[0], unet.config.time_embedding_type
    steps = unet.time_proj.embedding_dim if kind == "learned" else 2 * first if kind == "fourier" else first
    embedding = through(steps, unet.time_embedding.linear_1, unet.time_embedding.linear_2)
    if isinstance(unet.class_embedding, nn.Embedding):
        through(unet.class_embedding.num_embeddings, unet.class_embedding, to=embedding)
    elif isinstance(unet.class_embedding, TimestepEmbedding):
        through(steps, unet.class_embedding.linear_1, unet.class_embedding.linear_2, to=embedding)
    # 2. down: what a layer writes is also read on the way up
    channels = through(unet.config.in_channels, unet.conv_in)
    skips = [channels]
    for block in unet.down_blocks:
        for layers in [*pairs(block), *((sampler,) for sampler in block.downsamplers or ())]:
            skips.append(channels := along(channels, *layers))
    # 3. middle
    if unet.mid_block is not None:
        channels = along(channels, *chain(*pairs(unet.mid_block)))
    # 4. up, each pair after a concatenation
    for block in unet.up_blocks:
        for layers in pairs(block):
            channels = along(channels + skips.pop(), *layers)
        channels = along(channels, *block.upsamplers or ())
    through(channels, unet.conv_norm_out, unet.conv_out, to=unet.config.out_channels)


def _materialize(unet: nn.Module, device: torch.device) -> None:
    """Give a model on the meta device freshly initialized weights on `device`."""
    for module in unet.modules():
        if isinstance(module, GaussianFourierProjection):
            weight = torch.randn(module.weight.shape, device=device) * 16  # the scale that UNet2DModel passes
            module.weight = nn.Parameter(weight, requires_grad=False)
        elif next(module.parameters(recurse=False), None) is not None:
            module.to_empty(device=device, recurse=False)
            module.reset_parameters()


_DENSE = inspect.signature(UNet2DModel.__init__)


def _with_dense_signature(init):
    """Show `init` with the arguments of `UNet2DModel` before its own, as Diffusers' configuration reads them."""
    own = [p for p in inspect.signature(init).parameters.values() if p.kind is p.KEYWORD_ONLY]
    own = [p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in own]
    init.__signature__ = _DENSE.replace(parameters=[*_DENSE.parameters.values(), *own])
    return init


class GFPrunedUNet2DModel(UNet2DModel):
    r"""
    A [`UNet2DModel`] with the widths that gradient-flow pruning left (arXiv 2501.09464).

    Takes every argument of [`UNet2DModel`], with the values of the dense model, and:

    Parameters:
        layer_channels (`dict[str, tuple[int, int]]`, *optional*): Input and output channels of narrowed layers.
        norm_group_sizes (`dict[str, list[int]]`, *optional*): Channels in each group of narrowed group norms.
        attention_heads (`dict[str, int]`, *optional*): Heads left in attentions that lost some.

    Raises:
        ValueError: The widths do not fit together. Nothing is allocated before that is known.
    """

    _no_split_modules = ["ResnetBlock2D", "Attention"]
    _keys_to_ignore_on_load_unexpected = [r"attentions\.\d+\.to_qkv\.(weight|bias)$"]  # copies, made by fuse_projections
    _auto_class = "AutoModel"  # config.json then says where a trusting AutoModel finds this file
    _card: str | None = None
    checks: LoadingChecks = LoadingChecks()

    @register_to_config
    @_with_dense_signature
    def __init__(
        self,
        *args,
        layer_channels: dict[str, tuple[int, int]] | None = None,
        norm_group_sizes: dict[str, list[int]] | None = None,
        attention_heads: dict[str, int] | None = None,
        **kwargs,
    ):
        given = _DENSE.bind(self, *args, **kwargs)
        given.apply_defaults()
        dense = {name: value for name, value in given.arguments.items() if name != "self"}
        tables = {"layer_channels": layer_channels, "norm_group_sizes": norm_group_sizes, "attention_heads": attention_heads}
        tables = {name: {} if table is None else table for name, table in tables.items()}
        self.checks.arguments(dense)
        device = nn.Linear(1, 1).weight.device  # where weights go now: a device context, or meta while loading
        with torch.device("meta"):  # 1. the dense skeleton, without memory
            super().__init__(**dense)
        self.checks.tables(self, tables)
        _narrow(self, **tables)  # 2. the widths that are left
        _check_widths(self)  # 3. proof that they fit together
        if device.type != "meta":
            _materialize(self, device)  # 4. fresh weights

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file, *args, **kwargs):
        cls.checks.config_file(json_file)
        return super()._dict_from_json_file(json_file, *args, **kwargs)

    @classmethod
    @functools.wraps(UNet2DModel.from_pretrained.__func__)
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        if kwargs.pop("use_safetensors", True) is False or kwargs.get("use_flashpack"):
            raise ValueError("use_safetensors=False, use_flashpack=True: pruned models are loaded from safetensors only")
        device_map = kwargs.get("device_map")
        if not isinstance(device_map, Mapping) or "disk" not in device_map.values():
            kwargs.pop("offload_state_dict", None)  # Diffusers reads such weights back only beside others that stay on disk
        wants_info, name = kwargs.pop("output_loading_info", False), pretrained_model_name_or_path
        model, info = super().from_pretrained(name, use_safetensors=True, output_loading_info=True, **kwargs)
        # Diffusers only warns here, and leaves such weights random.
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if keys := sorted(map(str, info[problem])):
                found = f"{len(keys)} {problem.replace('_', ' ')}, first {keys[0]}"
                raise ValueError(f"{name}: the weights do not fit the config: {found}")
        return (model, info) if wants_info else model

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, files, *args, **kwargs):
        dtype = kwargs.get("dtype") or model.conv_in.weight.dtype
        cls.checks.weights(files, dtype, quantized=kwargs.get("hf_quantizer") is not None)
        return super()._load_pretrained_model(model, state_dict, files, *args, **kwargs)

    def to_json_string(self) -> str:
        # Where this copy was loaded from is nobody's business, and often a path.
        content = {key: value for key, value in json.loads(super().to_json_string()).items() if key != "_name_or_path"}
        return json.dumps(content, indent=2, sort_keys=True) + "\n"

    @functools.wraps(UNet2DModel.save_pretrained)
    def save_pretrained(self, save_directory, *args, **kwargs):
        given = inspect.signature(UNet2DModel.save_pretrained).bind(self, save_directory, *args, **kwargs).arguments
        if not given.get("safe_serialization", True):
            raise ValueError("safe_serialization=False: pruned models are saved as safetensors only")
        folder = pathlib.Path(save_directory)
        if given.get("is_main_process", True) and not folder.is_file():
            # Before the weights, so that an upload which the base class starts holds this file too.
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(shutil.SameFileError):
                shutil.copyfile(__file__, folder / "diffusers_gfprune.py")
            # Diffusers leaves the index of an earlier, sharded save behind, and would load by it.
            variant = f".{given['variant']}" if given.get("variant") else ""
            (folder / f"diffusion_pytorch_model.safetensors.index{variant}.json").unlink(missing_ok=True)
        card = folder / "README.md"
        self._card = card.read_text("utf-8") if card.is_file() else None
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _upload_folder(self, working_dir, *args, **kwargs):
        if self._card is not None:  # Diffusers has just written a generic card over it
            pathlib.Path(working_dir, "README.md").write_text(self._card, "utf-8")
        return super()._upload_folder(working_dir, *args, **kwargs)


# Saved pipelines name the library of a component by its class's module: this package, whose file travels with them.
GFPrunedUNet2DModel.__module__ = "diffusers_gfprune"

# Every pipeline of Diffusers that takes a UNet2DModel: `from_pipe` passes a component on only if its very class is in the
# annotation of the argument.
for _name in (
    *("ConsistencyModelPipeline", "DDIMPipeline", "DDPMPipeline", "KarrasVePipeline", "LDMPipeline"),
    *("LDMSuperResolutionPipeline", "PNDMPipeline", "RePaintPipeline", "ScoreSdeVePipeline"),
):
    with contextlib.suppress(AttributeError, RuntimeError):  # a Diffusers without it, or without what it needs
        _init = getattr(diffusers, _name).__init__
        _init.__annotations__["unet"] = typing.get_type_hints(_init)["unet"] | GFPrunedUNet2DModel  # a union holds it once
