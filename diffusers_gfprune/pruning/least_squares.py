"""Least squares for one layer, from sums that are streamed over batches.

A linear or convolutional layer reads rows x of features and writes W x + b. The change of its weights that brings the outputs
nearest to outputs that miss by a gap e, and its change of the bias, solve

    min over dW, db of   sum |dW x + db - e|^2  +  lambda |dW|^2

The sum runs over all rows: the tokens of a linear layer, or the patches of a convolution. The solution needs the sums
G = sum x x^T and C = sum x e^T only, with x extended by a 1 for the bias: (G + lambda I) [dW db]^T = C. The penalty is on the
change, so that lambda -> infinity leaves the weights as they are, and the bias is free: a constant gap is mended exactly.
lambda is `ridge` times the mean of sum x_i^2 over features i.

G has as many rows as there are features: C k^2 for a kernel of k x k and C input channels. For C = 2,560 and k = 3 it would
take 4 GiB. Where kept channels give more than 8,192 features, only the weights at the centre of the kernel change, which read
C features.

Layers of large images read more rows than are needed. `drawn_rows` chooses those of an image by a seed of this image. The sums
are thus the same, but for the order of additions, however images are split over batches and processes.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import mean_over_ranks

__all__ = ["MAX_FEATURES", "LeastSquares", "drawn_rows", "features", "output_rows"]

CHUNK_VALUES = 2**24  # of features at a time: 64 MiB in float32
MAX_FEATURES = 2**13  # 512 MiB for G, in float64


def features(layer: nn.Module, x: Tensor, centre: bool = False) -> Tensor:
    """What each output of a layer is linear in, with shape `(batch, rows, channels * kernel height * kernel width)`.

    Args:
        layer: A `Conv2d` or `Linear` layer.
        x: Its input with shape `(batch, channels, height, width)` or `(batch, *, channels)`; of some channels, or all.
        centre: For convolutions, only what the centre of the kernel reads: `(batch, rows, channels)`.
    """
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(len(x), -1, x.shape[-1])
    if centre:
        return _at_centre(layer, x).flatten(2).transpose(1, 2)
    return F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2)


def _at_centre(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """The values that the centre of the kernel reads, with shape `(batch, channels, output height, output width)`."""
    margins = []  # in the order of `pad`: the last dimension first; negative ones crop
    for size, k, d, p, s in zip(x.shape[2:], layer.kernel_size, layer.dilation, layer.padding, layer.stride):
        outputs = (size + 2 * p - d * (k - 1) - 1) // s + 1
        first = d * (k // 2) - p
        margins = [-first, first + s * (outputs - 1) + 1 - size, *margins]
    return F.pad(x, margins)[:, :, :: layer.stride[0], :: layer.stride[1]]


def output_rows(layer: nn.Module, y: Tensor) -> Tensor:
    """Outputs of a layer in the order of `features`, with shape `(batch, rows, channels)`."""
    return y.flatten(2).transpose(1, 2) if isinstance(layer, nn.Conv2d) else y.reshape(len(y), -1, y.shape[-1])


@lru_cache(maxsize=8)  # many layers read the same number of rows
def drawn_rows(seeds: tuple[int, ...], available: int, rows: int) -> Tensor:
    """Indices of rows that are drawn at random for each image, int64 with shape `(len(seeds), rows)`.

    Args:
        seeds: One for each image.
        available: Number of rows of an image.
        rows: Number of rows to draw of each, in [1, available].
    """
    generator = torch.Generator()
    return torch.stack([torch.randperm(available, generator=generator.manual_seed(seed))[:rows] for seed in seeds])


class LeastSquares:
    """The sums of one layer.

    Args:
        layer: A `Conv2d` or `Linear` layer of the masked model.
        inputs: Indices of the input channels it may use, int64.
        outputs: Indices of the output channels to mend, int64.
    """

    def __init__(self, layer: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
        self.layer, self.inputs, self.outputs = layer, inputs, outputs
        self.bias = layer.bias is not None
        self.kernel = tuple(layer.weight.shape[2:])
        self.centre = len(inputs) * layer.weight[0, 0].numel() > MAX_FEATURES
        size = len(inputs) * (1 if self.centre else layer.weight[0, 0].numel()) + self.bias
        empty = {"dtype": torch.float64, "device": layer.weight.device}
        self.gram = torch.zeros(size, size, **empty)  # G, of features and the 1
        self.cross = torch.zeros(size, len(outputs), **empty)  # C
        self.squares = torch.zeros(2, **empty)  # of gaps, and of wanted outputs

    def add(self, x: Tensor, gap: Tensor, wanted: Tensor, rows: int, seeds: tuple[int, ...]) -> None:
        """Add a batch.

        Args:
            x: Input of the layer, with all channels.
            gap: What its output misses, with all channels.
            wanted: Output that it should have, of the same shape, as a scale for the gap.
            rows: Number of rows to use of each image (>= 1). If there are more, they are drawn at random.
            seeds: One for each image, to draw rows.
        """
        channel = 1 if isinstance(self.layer, nn.Conv2d) else x.ndim - 1
        x = x.index_select(channel, self.inputs)
        gap = output_rows(self.layer, gap).index_select(2, self.outputs)
        wanted = output_rows(self.layer, wanted).index_select(2, self.outputs)
        self.squares += torch.stack([gap.float().square().sum(), wanted.float().square().sum()])
        per_sample = gap.shape[1]
        chunk = max(1, CHUNK_VALUES // (per_sample * len(self.gram)))
        drawn = drawn_rows(seeds, per_sample, rows).to(x.device) if rows < per_sample else None
        for first in range(0, len(x), chunk):
            images = slice(first, first + chunk)
            inputs, gaps = features(self.layer, x[images], self.centre), gap[images]
            if drawn is not None:
                image = torch.arange(len(gaps), device=x.device)[:, None]
                inputs, gaps = inputs[image, drawn[images]], gaps[image, drawn[images]]
            inputs, gaps = inputs.flatten(0, 1).float(), gaps.flatten(0, 1).float()
            if self.bias:
                inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
            self.gram += inputs.T @ inputs
            self.cross += inputs.T @ gaps

    def reduce(self) -> float:
        """Add up the sums of all processes.

        Returns:
            Size of the gap relative to that of the outputs (>= 0); not finite if a gap or an output is not.
        """
        mean_over_ranks([self.gram, self.cross, self.squares])  # the scale of all sums is free
        gap, wanted = self.squares.tolist()
        if not math.isfinite(gap + wanted):
            return math.nan
        return (gap / wanted) ** 0.5 if wanted > 0 else 0.0

    def solve(self, ridge: float) -> tuple[Tensor, Tensor | None]:
        """The changes of weight and bias.

        Args:
            ridge: lambda relative to the mean of sum x_i^2 (> 0).

        Returns:
            Change of the weight at `outputs` and `inputs`, float64 with shape `(outputs, inputs, *kernel)`, and of the bias
            at `outputs`, None without a bias.

        The solution is not finite if an input is not.
        """
        size = len(self.gram) - self.bias
        gram = self.gram.clone()
        diagonal = gram.diagonal()
        scale = diagonal[:size].mean()
        diagonal[:size] += ridge * scale if scale > 0 else 1.0  # without any input, nothing is changed
        solution = torch.linalg.solve(gram, self.cross)
        weight = solution[:size].T
        if self.centre:
            whole = weight.new_zeros(len(self.outputs), len(self.inputs), *self.kernel)
            whole[(..., *(k // 2 for k in self.kernel))] = weight
            weight = whole
        bias = solution[size] if self.bias else None
        return weight.reshape(len(self.outputs), len(self.inputs), *self.kernel), bias
