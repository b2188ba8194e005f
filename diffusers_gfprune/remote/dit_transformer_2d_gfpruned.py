"""GFPrunedDiTTransformer2DModel: a `DiTTransformer2DModel` narrowed by pruning (`pruned_layers`)."""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel

from .pruned_layers import RemovedBlock, make_positions
from .pruned_model import GFPrunedMixin, accept_in_pipelines, pruned_init

__all__ = ["GFPrunedDiTTransformer2DModel"]


class GFPrunedDiTTransformer2DModel(GFPrunedMixin, DiTTransformer2DModel):
    r"""
    A [`DiTTransformer2DModel`] with layers narrowed and blocks removed by pruning (gradient flow: arXiv 2501.09464).

    It takes all arguments of [`DiTTransformer2DModel`], with the values of the dense model, and:

    Parameters:
        layer_channels (`dict[str, tuple[int, int]]`, *optional*): Input and output channels of narrowed layers.
        norm_group_sizes (`dict[str, list[int]]`, *optional*): Not used, since the model has no group norms.
        attention_heads (`dict[str, int]`, *optional*): Kept heads of attentions with fewer heads.
        removed_blocks (`list[str]`, *optional*): Residual blocks without their branch.

    Raises:
        ValueError: The widths do not fit together. They are checked before memory is allocated.
    """

    _no_split_modules = ["BasicTransformerBlock"]
    class_file = __file__
    __init__ = pruned_init(DiTTransformer2DModel)

    def check_widths(self) -> None:
        # The hidden states keep their width: layer norms read all of their channels
        hidden = self.inner_dim
        self._through(self.config.in_channels, self.pos_embed.proj, to=hidden)
        for block in self.transformer_blocks:
            if isinstance(block, RemovedBlock):
                continue
            # 1. time and class
            conditioning = block.norm1.emb
            time, table = conditioning.timestep_embedder, conditioning.class_embedder.embedding_table
            embedding = self._through(conditioning.time_proj.num_channels, time.linear_1, time.linear_2)
            self._through(table.num_embeddings, table, to=embedding)
            self._through(embedding, block.norm1.linear, to=6 * hidden)
            # 2. attention and feed-forward
            self._along(embedding, hidden, block.attn1, block.ff)
            if block is self.transformer_blocks[0]:  # never removed: its embedding also scales and shifts the output
                self._through(embedding, self.proj_out_1, to=2 * hidden)
        self._through(hidden, self.proj_out_2, to=self.patch_size**2 * self.out_channels)

    def make_buffers(self, device: torch.device) -> None:
        make_positions(self.pos_embed, device)


# Saved pipelines name the library of a component by its class's module: this package, whose file is saved with them.
GFPrunedDiTTransformer2DModel.__module__ = "diffusers_gfprune"

accept_in_pipelines(GFPrunedDiTTransformer2DModel, DiTTransformer2DModel)
