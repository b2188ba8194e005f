"""GFPrunedUNet2DConditionModel: a `UNet2DConditionModel` narrowed by pruning (`pruned_layers`)."""

from __future__ import annotations

from itertools import chain, zip_longest

from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding
from torch import nn

from .pruned_model import GFPrunedMixin, accept_in_pipelines, pruned_init

__all__ = ["GFPrunedUNet2DConditionModel"]


class GFPrunedUNet2DConditionModel(GFPrunedMixin, UNet2DConditionModel):
    r"""
    A [`UNet2DConditionModel`] with layers narrowed and blocks removed by pruning (gradient flow: arXiv 2501.09464).

    It takes all arguments of [`UNet2DConditionModel`], with the values of the dense model, and:

    Parameters:
        layer_channels (`dict[str, tuple[int, int]]`, *optional*): Input and output channels of narrowed layers.
        norm_group_sizes (`dict[str, list[int]]`, *optional*): Channels in each group of narrowed group norms.
        attention_heads (`dict[str, int]`, *optional*): Kept heads of attentions with fewer heads.
        removed_blocks (`list[str]`, *optional*): Residual blocks without their branch.

    Raises:
        ValueError: The widths do not fit together. They are checked before memory is allocated.
    """

    class_file = __file__
    fourier_scale = 1.0
    __init__ = pruned_init(UNet2DConditionModel)

    def check_widths(self) -> None:
        config = self.config
        # 1. time, classes and text
        fourier = config.time_embedding_type == "fourier"
        dense = config.time_embedding_dim or (2 if fourier else 4) * config.block_out_channels[0]
        steps = dense if fourier else config.block_out_channels[0]
        if self.time_embedding.cond_proj is not None:
            self._through(config.time_cond_proj_dim, self.time_embedding.cond_proj, to=steps)
        embedding = self._through(steps, self.time_embedding.linear_1, self.time_embedding.linear_2)
        width = None if config.class_embeddings_concat else embedding  # of the class embedding
        labels = self.class_embedding
        if isinstance(labels, nn.Embedding):
            width = self._through(labels.num_embeddings, labels, to=width)
        elif isinstance(labels, TimestepEmbedding):
            reads = steps if config.class_embed_type == "timestep" else config.projection_class_embeddings_input_dim
            width = self._through(reads, labels.linear_1, labels.linear_2, to=width)
        elif isinstance(labels, nn.Linear):
            width = self._through(config.projection_class_embeddings_input_dim, labels, to=width)
        elif labels is not None:  # the labels are embeddings
            if width not in (None, dense):
                self._refuse(self.time_embedding.linear_2, f"has {width} output channels, but must have {dense}")
            width = dense
        if labels is not None and config.class_embeddings_concat:
            embedding += width
        if config.addition_embed_type is not None:
            layers = self.add_embedding.linear_1, self.add_embedding.linear_2
            self._through(config.projection_class_embeddings_input_dim, *layers, to=embedding)
        context = config.cross_attention_dim
        context = context if isinstance(context, int) else context[0]
        if self.encoder_hid_proj is not None:
            context = self._through(config.encoder_hid_dim, self.encoder_hid_proj)

        def along(channels: int, *blocks: nn.Module | None) -> int:
            return self._along(embedding, channels, *blocks, context=context)

        # 2. down: the output of every layer is also a skip connection to the up blocks
        skips = [channels := self._through(config.in_channels, self.conv_in)]
        for block in self.down_blocks:
            for layers in [*_pairs(block), *((sampler,) for sampler in block.downsamplers or ())]:
                skips.append(channels := along(channels, *layers))
        # 3. middle
        if self.mid_block is not None:
            channels = along(channels, *chain(*_pairs(self.mid_block)))
        # 4. up, each pair after a concatenation
        for block in self.up_blocks:
            for layers in _pairs(block):
                channels = along(channels + skips.pop(), *layers)
            channels = along(channels, *block.upsamplers or ())
        self._through(channels, self.conv_norm_out, self.conv_out, to=config.out_channels)


def _pairs(block: nn.Module) -> zip_longest:
    """The residual blocks of a block, each with the transformer or attention that follows, or None."""
    return zip_longest(block.resnets, getattr(block, "attentions", ()))


# Saved pipelines name the library of a component by its class's module: this package, whose file is saved with them.
GFPrunedUNet2DConditionModel.__module__ = "diffusers_gfprune"

accept_in_pipelines(GFPrunedUNet2DConditionModel, UNet2DConditionModel)
