"""GFPrunedSD3Transformer2DModel: an `SD3Transformer2DModel` narrowed by pruning (`pruned_layers`)."""

from __future__ import annotations

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import Attention

from .pruned_layers import RemovedBlock, make_positions
from .pruned_model import GFPrunedMixin, accept_in_pipelines, pruned_init

__all__ = ["GFPrunedSD3Transformer2DModel"]


class GFPrunedSD3Transformer2DModel(GFPrunedMixin, SD3Transformer2DModel):
    r"""
    An [`SD3Transformer2DModel`] with layers narrowed and blocks removed by pruning (gradient flow: arXiv 2501.09464).

    It takes all arguments of [`SD3Transformer2DModel`], with the values of the dense model, and:

    Parameters:
        layer_channels (`dict[str, tuple[int, int]]`, *optional*): Input and output channels of narrowed layers.
        norm_group_sizes (`dict[str, list[int]]`, *optional*): Not used, since the model has no group norms.
        attention_heads (`dict[str, int]`, *optional*): Kept heads of attentions with fewer heads.
        removed_blocks (`list[str]`, *optional*): Residual blocks without their branch.

    Raises:
        ValueError: The widths do not fit together. They are checked before memory is allocated.
    """

    class_file = __file__
    __init__ = pruned_init(SD3Transformer2DModel)

    def check_widths(self) -> None:
        # The hidden states of image and text keep their width: layer norms read all of their channels
        hidden, config = self.inner_dim, self.config
        self._through(config.in_channels, self.pos_embed.proj, to=hidden)
        self._through(config.joint_attention_dim, self.context_embedder, to=hidden)
        # 1. time and pooled text: one embedding for all blocks
        embedder, pooled = self.time_text_embed.timestep_embedder, self.time_text_embed.text_embedder
        sinusoids = self.time_text_embed.time_proj.num_channels
        embedding = self._through(sinusoids, embedder.linear_1, embedder.linear_2)
        self._through(config.pooled_projection_dim, pooled.linear_1, pooled.linear_2, to=embedding)
        # 2. attention of both streams, or of the image only, and a feed-forward of each
        for block in self.transformer_blocks:
            if isinstance(block, RemovedBlock):
                continue
            last = block.context_pre_only
            self._through(embedding, block.norm1.linear, to=(9 if block.use_dual_attention else 6) * hidden)
            self._through(embedding, block.norm1_context.linear, to=(2 if last else 6) * hidden)
            self._along(embedding, hidden, block.attn, block.attn2, block.ff, block.ff_context)
            for attention in filter(None, (block.attn, block.attn2)):
                self._check_heads(attention)
            inner = block.attn.to_q.out_features
            for layer in (block.attn.add_q_proj, block.attn.add_k_proj, block.attn.add_v_proj):
                self._through(hidden, layer, to=inner)
            if not last:
                self._through(inner, block.attn.to_add_out, to=hidden)
        self._through(embedding, self.norm_out.linear, to=2 * hidden)
        self._through(hidden, self.proj_out, to=config.patch_size**2 * self.out_channels)

    def _check_heads(self, attention: Attention) -> None:
        """Norms of queries and keys are as wide as the heads of the dense model."""
        width, heads = self.config.attention_head_dim, attention.heads
        if self.config.qk_norm is not None and attention.to_q.out_features != heads * width:
            problem = f"has {attention.to_q.out_features} output channels, but must have {heads * width} with {heads} heads"
            self._refuse(attention.to_q, f"{problem} and qk_norm={self.config.qk_norm}")

    def make_buffers(self, device: torch.device) -> None:
        make_positions(self.pos_embed, device)


# Saved pipelines name the library of a component by its class's module: this package, whose file is saved with them.
GFPrunedSD3Transformer2DModel.__module__ = "diffusers_gfprune"

accept_in_pipelines(GFPrunedSD3Transformer2DModel, SD3Transformer2DModel)
