"""GFPrunedPixArtTransformer2DModel: a `PixArtTransformer2DModel` narrowed by pruning (`pruned_layers`)."""

from __future__ import annotations

import torch
from diffusers import PixArtTransformer2DModel

from .pruned_layers import RemovedBlock, make_positions
from .pruned_model import GFPrunedMixin, accept_in_pipelines, pruned_init

__all__ = ["GFPrunedPixArtTransformer2DModel"]


class GFPrunedPixArtTransformer2DModel(GFPrunedMixin, PixArtTransformer2DModel):
    r"""
    A [`PixArtTransformer2DModel`] with layers narrowed and blocks removed by pruning (gradient flow: arXiv 2501.09464).

    It takes all arguments of [`PixArtTransformer2DModel`], with the values of the dense model, and:

    Parameters:
        layer_channels (`dict[str, tuple[int, int]]`, *optional*): Input and output channels of narrowed layers.
        norm_group_sizes (`dict[str, list[int]]`, *optional*): Not used, since the model has no group norms.
        attention_heads (`dict[str, int]`, *optional*): Kept heads of attentions with fewer heads.
        removed_blocks (`list[str]`, *optional*): Residual blocks without their branch.

    Raises:
        ValueError: The widths do not fit together. They are checked before memory is allocated.
    """

    class_file = __file__
    __init__ = pruned_init(PixArtTransformer2DModel)

    def check_widths(self) -> None:
        # The hidden states keep their width: layer norms read all of their channels
        hidden, config = self.inner_dim, self.config
        self._through(config.in_channels, self.pos_embed.proj, to=hidden)
        # 1. time and sizes: one embedding for all blocks
        embedders = self.adaln_single.emb
        sinusoids, layers = embedders.time_proj.num_channels, [(embedders.timestep_embedder, hidden)]
        if self.use_additional_conditions:
            layers += [(embedders.resolution_embedder, embedders.outdim), (embedders.aspect_ratio_embedder, embedders.outdim)]
        for embedder, width in layers:
            self._through(sinusoids, embedder.linear_1, embedder.linear_2, to=width)
        self._through(hidden, self.adaln_single.linear, to=6 * hidden)
        # 2. text
        context, projection = config.cross_attention_dim, self.caption_projection
        if projection is not None:  # its output is viewed as tokens of the width of the hidden states
            context = self._through(config.caption_channels, projection.linear_1, projection.linear_2, to=hidden)
        # 3. self-attention, cross-attention and feed-forward
        for block in self.transformer_blocks:
            if not isinstance(block, RemovedBlock):
                self._along(hidden, hidden, block.attn1, block.attn2, block.ff, context=context)
        self._through(hidden, self.proj_out, to=config.patch_size**2 * self.out_channels)

    def make_buffers(self, device: torch.device) -> None:
        make_positions(self.pos_embed, device)


# Saved pipelines name the library of a component by its class's module: this package, whose file is saved with them.
GFPrunedPixArtTransformer2DModel.__module__ = "diffusers_gfprune"

accept_in_pipelines(GFPrunedPixArtTransformer2DModel, PixArtTransformer2DModel)
