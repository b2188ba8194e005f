"""Distance between block outputs of student and teacher.

The output of every block (`Family.block_outputs`) is part of the residual stream. The masked student has all channels of the
dense model, scaled by their masks m; the compacted student has the kept channels in the same order. The distance is

    1/|blocks| sum_b  |f_b - m_b * F_b|^2 / |m_b * F_b|^2        f: student, F: teacher, * per channel

for every image, then the mean over images. All blocks and noise levels therefore have the same weight, and the mean over a
large batch is the mean over its parts. A masked channel is m_c times the output of its layers, so that its target is m_c F_c:
with the target F_c, weights would grow to compensate a falling mask. With binary masks only kept channels contribute, before
and after compaction. Outputs whose channels are never pruned, such as the hidden states of transformers, are compared as they
are (m = 1).

BK-SDM (Kim et al., https://arxiv.org/abs/2305.15798) uses the same loss without masks and denominator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..families.lookup import family_of
from ..pruning.channel_groups import ChannelGroup, slices_by_dimension
from ..pruning.masking import ChannelMasks

__all__ = ["BlockOutputDistance", "feature_channels"]


def feature_channels(unet: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Channel group of each block's output.

    Args:
        unet: The dense model.
        groups: Its channel groups.

    Returns:
        By block name, the name of the group, and the positions of its channels in the block's output. Blocks whose channels
        are never pruned are left out.

    Raises:
        ValueError: The output of a block does not consist of the channels of one group.
    """
    modules = dict(unet.named_modules())
    table = slices_by_dimension(groups)
    channels = {}
    for name, producer in family_of(unet).block_outputs(unet).items():
        width, parts = len(modules[producer].weight), table.get((producer, "weight", 0), [])
        if not parts:
            continue
        if len(parts) != 1 or sorted(parts[0][1].positions) != list(range(width)):
            raise ValueError(f"the {width} output channels of {name} are in {len(parts)} channel groups, not in one")
        ((group, piece),) = parts
        channels[name] = group.name, piece.positions
    return channels


class BlockOutputDistance:
    """Relative squared distance between block outputs of student and teacher.

    Args:
        unet: The dense model.
        channel_masks: The current masks of the student; after compaction, the masks of the compaction.
    """

    def __init__(self, unet: nn.Module, channel_masks: ChannelMasks) -> None:
        self.channel_masks = channel_masks
        self.channels = feature_channels(unet, tuple(channel_masks.groups.values()))
        # Index in its group of channel i of a block's output.
        self.sources = {name: torch.tensor(positions).argsort() for name, (_, positions) in self.channels.items()}
        self._key: tuple | None = None
        self._masks: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}

    def _mask(self, name: str, device: torch.device) -> Tensor:
        """The mask of a block's output, with shape `(channels,)`."""
        if self._key != (self.channel_masks.version, device):
            self._key = (self.channel_masks.version, device)
            self._masks, self._kept = {}, {}
            self.sources = {block: source.to(device) for block, source in self.sources.items()}
        if name not in self._masks:
            group, _ = self.channels[name]
            by_channel = self.channel_masks.groups[group].per_channel(self.channel_masks[group])
            self._masks[name] = by_channel.to(device)[self.sources[name]]
        return self._masks[name]

    def target(self, name: str, output: Tensor, channels: int) -> Tensor:
        """Target of a block's output for a student with `channels` channels.

        Args:
            name: Name of the block.
            output: The teacher's output, with shape `(batch, dense channels, height, width)`.
            channels: Number of channels of the student's output.

        Returns:
            The target with shape `(batch, channels, height, width)`.

        Raises:
            ValueError: The student is neither masked nor compacted with these masks.
        """
        mask = self._mask(name, output.device)
        if channels == output.shape[1]:
            return output if self.channel_masks.all_ones else output * mask[:, None, None]
        if name not in self._kept:
            self._kept[name] = mask.nonzero().flatten()
        kept = self._kept[name]
        if channels != len(kept):
            raise ValueError(f"{name} has {channels} channels, but its masks keep {len(kept)} of {output.shape[1]}")
        return output.index_select(1, kept)

    def __call__(self, features: Mapping[str, Tensor], teacher_features: Mapping[str, Tensor]) -> Tensor:
        """Compute the distance.

        Args:
            features: Block outputs of the student, each with shape `(batch, channels, height, width)`, or
                `(batch, tokens, channels)` if the channels are never pruned.
            teacher_features: Block outputs of the teacher for the same images.

        Returns:
            The mean over blocks for each image, float32 with shape `(batch,)`.
        """
        distances = []
        for name, output in features.items():
            target = teacher_features[name].float()
            if name in self.channels:
                target = self.target(name, target, output.shape[1])
            squared_error = (output.float() - target).square().flatten(1).sum(dim=1)  # (batch,)
            size = target.square().flatten(1).sum(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
            distances.append(squared_error / size)
        return torch.stack(distances).mean(dim=0)
