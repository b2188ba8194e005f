"""Pruned models: classes of Diffusers whose layers were narrowed, and whose blocks were removed, by pruning.

The configuration of a pruned model is that of the dense model plus four tables, so `from_pretrained` builds the small model
directly from `config.json`:

    layer_channels     {"down_blocks.0.resnets.0.conv1": [48, 24], ...}    input and output channels of a layer
    norm_group_sizes   {"down_blocks.0.resnets.0.norm2": [4, 4, 4, ...]}   channels in each norm group
    attention_heads    {"down_blocks.1.attentions.0": 3}                   number of kept heads
    removed_blocks     ["mid_block.attentions.0", ...]                     residual blocks without their branch

Layers that are not in a table are as wide as in the dense model. A kept channel `c` stays in its norm group `g` of the dense
model (https://arxiv.org/abs/1803.08494): `y_c = gamma_c (x_c - mean_g) / sqrt(var_g + eps) + beta_c`. Groups of equal size use
`nn.GroupNorm`. Groups of unequal size, from earlier versions of pruning, use `RaggedGroupNorm`. A removed block is a
`RemovedBlock`, which passes its input on.

A pruned class is saved with its model as one self-contained file, `diffusers_gfprune.py`: the text of this file, then those of
`pruned_model.py` and of the class. They import only the standard library, torch and Diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import GaussianFourierProjection, PatchEmbed, get_2d_sincos_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import RMSNorm
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

__all__ = ["RaggedGroupNorm", "RemovedBlock", "channels_of", "make_positions", "materialize", "narrow", "remove_blocks"]


class RaggedGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` with groups of any size: a native norm is applied to each group.

    Args:
        group_sizes: Channels in each group, in order (each >= 1).
        eps: Added to the variance (> 0).
    """

    def __init__(self, group_sizes: Sequence[int], eps: float = 1e-5, device=None) -> None:
        super().__init__(1, sum(group_sizes), eps, device=device)  # one group, which divides any number of channels
        self.num_groups, self.group_sizes = len(group_sizes), tuple(group_sizes)

    def forward(self, input: Tensor) -> Tensor:
        # (batch, channels, *) in groups; the native kernel computes statistics of half precision in float32
        groups = zip(*(tensor.split(self.group_sizes, dim) for tensor, dim in ((input, 1), (self.weight, 0), (self.bias, 0))))
        return torch.cat([F.group_norm(x, 1, gamma, beta, self.eps) for x, gamma, beta in groups], dim=1)

    def extra_repr(self) -> str:
        return f"group_sizes={list(self.group_sizes)}, eps={self.eps}"


class RemovedBlock(nn.Module):
    """A residual block without its branch: `y = shortcut(resized(x)) / factor`.

    A residual block adds the output of a branch to its input. What is left of it is its input, resized if the block does so,
    its shortcut convolution if it has one, and the factor by which it divides the sum.

    Args:
        block: A `ResnetBlock2D`, an `Attention` with a residual connection, a `Transformer2DModel` or one of its layers, or a
            `JointTransformerBlock`, which adds to two streams: those of the image and of the text.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.is_transformer = isinstance(block, Transformer2DModel)
        self.is_joint = isinstance(block, JointTransformerBlock)
        if self.is_joint:
            self.context_pre_only = block.context_pre_only  # which the model reads
        self.up, self.down = (getattr(block, name, None) is not None for name in ("upsample", "downsample"))
        self.factor = getattr(block, "output_scale_factor", getattr(block, "rescale_output_factor", 1.0))
        self.conv_shortcut = getattr(block, "conv_shortcut", None)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args, return_dict: bool = True, **kwargs
    ):
        """Takes the arguments of every kind of block, and returns what that block returns."""
        if self.is_joint:
            return encoder_hidden_states, hidden_states
        if self.up:
            hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        if self.down:
            hidden_states = F.avg_pool2d(hidden_states, 2)
        if self.conv_shortcut is not None:
            hidden_states = self.conv_shortcut(hidden_states)
        if self.factor != 1:
            hidden_states = hidden_states / self.factor
        if not self.is_transformer:
            return hidden_states
        return Transformer2DModelOutput(sample=hidden_states) if return_dict else (hidden_states,)

    def extra_repr(self) -> str:
        return f"factor={self.factor:g}"


def channels_of(layer: nn.Module) -> tuple[int, int]:
    """Input and output channels of a layer."""
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


def remove_blocks(model: nn.Module, names: Sequence[str]) -> None:
    """Remove the branches of blocks of a dense model in place.

    Args:
        model: The dense model.
        names: Names of the blocks.

    Raises:
        ValueError: A module of this name does not exist, or its branch cannot be removed.
    """
    for name in names:
        block = dict(model.named_modules()).get(name)
        adds = isinstance(block, Attention) and block.residual_connection
        if not (adds or isinstance(block, (ResnetBlock2D, Transformer2DModel, BasicTransformerBlock, JointTransformerBlock))):
            raise ValueError(f"removed_blocks names {name!r}, which is not a block that can be removed")
        model.set_submodule(name, RemovedBlock(block))


def narrow(model: nn.Module, layer_channels: Mapping, norm_group_sizes: Mapping, attention_heads: Mapping) -> None:
    """Narrow a dense model on the meta device in place, which is much faster than creating new layers."""
    modules = dict(model.named_modules())
    for name, channels in layer_channels.items():
        _narrow_layer(modules[name], *channels)
    for name, sizes in norm_group_sizes.items():
        norm = modules[name]
        if len(set(sizes)) > 1:
            model.set_submodule(name, RaggedGroupNorm(sizes, norm.eps, "meta"))
        else:
            norm.num_groups, norm.num_channels = len(sizes), sum(sizes)
            norm.weight.data, norm.bias.data = (torch.empty(sum(sizes), device="meta") for _ in range(2))
    for name, module in modules.items():
        if isinstance(module, ResnetBlock2D):
            module.in_channels, module.out_channels = module.conv1.in_channels, module.conv2.out_channels
            for sampler in filter(None, (module.upsample, module.downsample)):
                sampler.channels = sampler.out_channels = module.in_channels
        elif isinstance(module, (Upsample2D, Downsample2D)) and isinstance(module.conv, nn.Conv2d):
            module.channels, module.out_channels = channels_of(module.conv)
        elif isinstance(module, Transformer2DModel):
            module.in_channels, module.out_channels = module.norm.num_channels, channels_of(module.proj_out)[1]
        elif isinstance(module, Attention):
            module.heads = attention_heads.get(name, module.heads)
            module.sliceable_head_dim = max(2, module.heads)  # slices of a half of it, at least one head
            module.inner_dim = module.inner_kv_dim = module.to_q.out_features
            module.query_dim, module.cross_attention_dim = module.to_q.in_features, module.to_k.in_features
            module.out_dim = module.out_context_dim = module.to_out[0].out_features
            module.scale = (module.inner_dim // module.heads) ** -0.5


def materialize(model: nn.Module, device: torch.device) -> None:
    """Give a model on the meta device freshly initialized weights on `device`."""
    for module in model.modules():
        if isinstance(module, GaussianFourierProjection):
            weight = torch.randn(module.weight.shape, device=device) * model.fourier_scale
            module.weight = nn.Parameter(weight, requires_grad=False)
        elif next(module.parameters(recurse=False), None) is not None:
            module.to_empty(device=device, recurse=False)
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            else:  # blocks and models with tables of scales and shifts, as Diffusers initializes them
                for table in module.parameters(recurse=False):
                    nn.init.normal_(table, std=table.shape[-1] ** -0.5)


def make_positions(embed: PatchEmbed, device: torch.device) -> None:
    """Compute the sinusoidal position embeddings of a model on `device`. They are not saved with the weights, unless the model
    has those of a largest sample, whose middle it takes."""
    table = get_2d_sincos_pos_embed(
        embed.proj.out_channels,
        embed.pos_embed_max_size or embed.height,
        base_size=embed.base_size,
        interpolation_scale=embed.interpolation_scale,
        device=device,
        output_type="pt",
    )
    embed.pos_embed = table.float().unsqueeze(0)
