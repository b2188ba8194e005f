"""GFPrunedUNet2DModel: a `UNet2DModel` narrowed by pruning (`pruned_layers`)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, zip_longest

from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from .pruned_model import GFPrunedMixin, accept_in_pipelines, pruned_init

__all__ = ["GFPrunedUNet2DModel"]


class GFPrunedUNet2DModel(GFPrunedMixin, UNet2DModel):
    r"""
    A [`UNet2DModel`] with layers narrowed and blocks removed by pruning (gradient flow: arXiv 2501.09464).

    It takes all arguments of [`UNet2DModel`], with the values of the dense model, and:

    Parameters:
        layer_channels (`dict[str, tuple[int, int]]`, *optional*): Input and output channels of narrowed layers.
        norm_group_sizes (`dict[str, list[int]]`, *optional*): Channels in each group of narrowed group norms.
        attention_heads (`dict[str, int]`, *optional*): Kept heads of attentions with fewer heads.
        removed_blocks (`list[str]`, *optional*): Residual blocks without their branch.

    Raises:
        ValueError: The widths do not fit together. They are checked before memory is allocated.
    """

    # Up blocks join skip connections, which must be on the same device
    _no_split_modules = ["ResnetBlock2D", "Attention", "UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"]
    class_file = __file__
    __init__ = pruned_init(UNet2DModel)

    def check_widths(self) -> None:
        # 1. time and class
        first, kind = self.config.block_out_channels[0], self.config.time_embedding_type
        steps = self.time_proj.embedding_dim if kind == "learned" else 2 * first if kind == "fourier" else first
        embedding = self._through(steps, self.time_embedding.linear_1, self.time_embedding.linear_2)
        if isinstance(self.class_embedding, nn.Embedding):
            self._through(self.class_embedding.num_embeddings, self.class_embedding, to=embedding)
        elif isinstance(self.class_embedding, TimestepEmbedding):
            self._through(steps, self.class_embedding.linear_1, self.class_embedding.linear_2, to=embedding)

        def pairs(block: nn.Module) -> Iterator[tuple[ResnetBlock2D, Attention | None]]:
            return zip_longest(block.resnets, getattr(block, "attentions", ()))

        # 2. down: the output of every layer is also a skip connection to the up blocks
        skips = [channels := self._through(self.config.in_channels, self.conv_in)]
        for block in self.down_blocks:
            for layers in [*pairs(block), *((sampler,) for sampler in block.downsamplers or ())]:
                skips.append(channels := self._along(embedding, channels, *layers))
        # 3. middle
        if self.mid_block is not None:
            channels = self._along(embedding, channels, *chain(*pairs(self.mid_block)))
        # 4. up, each pair after a concatenation
        for block in self.up_blocks:
            for layers in pairs(block):
                channels = self._along(embedding, channels + skips.pop(), *layers)
            channels = self._along(embedding, channels, *block.upsamplers or ())
        self._through(channels, self.conv_norm_out, self.conv_out, to=self.config.out_channels)


# Saved pipelines name the library of a component by its class's module: this package, whose file is saved with them.
GFPrunedUNet2DModel.__module__ = "diffusers_gfprune"

accept_in_pipelines(GFPrunedUNet2DModel, UNet2DModel)
