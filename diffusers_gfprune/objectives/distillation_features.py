"""Block outputs of student and teacher, channel by channel.

The output of every block (`Family.block_outputs`) is a stretch of the residual stream. Channels of the pruned
model are channels of the dense one: masked, it has all of them, scaled by their masks m; compacted, it has the kept ones, in
their order. The distance is

    1/|blocks| sum_b  |f_b - m_b * F_b|^2 / |m_b * F_b|^2        f: student, F: teacher, * per channel

for every image, then its mean over images. Blocks and noise levels weigh alike that way, and the mean over a large batch is
the mean over its parts. A masked channel is m_c times what its layers make, so m_c F_c is what it should be: were the target
F_c, weights would grow against a falling mask. With binary masks only kept channels count, before compaction and after it.

Distilling block outputs is the feature loss of BK-SDM (Kim et al., https://arxiv.org/abs/2305.15798), which has
neither masks nor the denominator.
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
    """Which channel group the output of each block is made of.

    Args:
        unet: The dense model.
        groups: Its channel groups.

    Returns:
        By block name, the name of the group and where each of its channels lies in the block's output.

    Raises:
        ValueError: The channels of a block's output are not those of one group.
    """
    modules = dict(unet.named_modules())
    table = slices_by_dimension(groups)
    channels = {}
    for name, producer in family_of(unet).block_outputs(unet).items():
        width, parts = modules[producer].out_channels, table.get((producer, "weight", 0), [])
        if len(parts) != 1 or sorted(parts[0][1].positions) != list(range(width)):
            raise ValueError(f"the {width} channels that {name} puts out are in {len(parts)} channel groups, not all in one")
        ((group, piece),) = parts
        channels[name] = group.name, piece.positions
    return channels


class BlockOutputDistance:
    """Relative squared distance between block outputs of student and teacher.

    Args:
        unet: The dense model.
        channel_masks: The masks of the student, which follow the pruning; after compaction, those it was compacted by.
    """

    def __init__(self, unet: nn.Module, channel_masks: ChannelMasks) -> None:
        self.channel_masks = channel_masks
        self.channels = feature_channels(unet, tuple(channel_masks.groups.values()))
        # Where channel i of a block's output lies in its group.
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
        """What a student of `channels` channels should have at the end of a block.

        Args:
            name: The block.
            output: The teacher's output, with shape `(batch, dense channels, height, width)`.
            channels: Channels of the student's output.

        Returns:
            The target with shape `(batch, channels, height, width)`.

        Raises:
            ValueError: The student is neither dense nor compacted by these masks.
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
        """The distance.

        Args:
            features: The student's output of each block, with shape `(batch, channels, height, width)`.
            teacher_features: The teacher's, of the same images.

        Returns:
            A float32 scalar.
        """
        distances = []
        for name, output in features.items():
            target = self.target(name, teacher_features[name].float(), output.shape[1])
            squared_error = (output.float() - target).square().flatten(1).sum(dim=1)  # (batch,)
            size = target.square().flatten(1).sum(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
            distances.append((squared_error / size).mean())
        return torch.stack(distances).mean()
