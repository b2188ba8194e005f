"""pruning/tracing.py: channels that live or die together, on small modules with known answers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from diffusers_gfprune.pruning.dependencies import join
from diffusers_gfprune.pruning.tracing import FIXED, trace_labels

Channel = tuple[str, str, int]  # layer, side, index


class Net(nn.Module):
    """Layers, and a forward of them."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def classes(forward: Callable, shape: tuple[int, ...] = (1, 2), **layers: nn.Module) -> tuple[set[frozenset], set[Channel]]:
    """The channels that live or die together, more than one each, and all that are never pruned."""
    net = Net(forward, **layers).to("meta").eval()
    widths = {}
    for name, layer in layers.items():
        width = layer.weight.shape[1] if isinstance(layer, nn.Embedding) else layer.weight.shape[0]
        widths |= {(name, "in"): layer.weight.shape[1]} if isinstance(layer, (nn.Linear, nn.Conv2d)) else {}
        widths[name, "out"] = width
    starts, channels = {}, [None]
    for place, width in widths.items():
        starts[place] = len(channels)
        channels += [(*place, index) for index in range(width)]
    (first, second), _ = trace_labels(net, lambda: net(torch.zeros(shape, device="meta")), layers, starts)
    labels = join(first, second, len(channels))
    sets: dict[int, set] = {}
    for channel, label in zip(channels, labels.tolist()):
        sets.setdefault(label, set()).add(channel)
    fixed = sets.pop(int(labels[FIXED])) - {None}
    return {frozenset(members) for members in sets.values() if len(members) > 1}, fixed


def pairs(*places: tuple[str, str], width: int, offsets: dict[tuple[str, str], tuple[int, ...]] | None = None) -> set:
    """Channel i of every place, at `i + offset` for each of its offsets."""
    starts = [(place, offset) for place in places for offset in (offsets or {}).get(place, (0,))]
    return {frozenset((*place, index + offset) for place, offset in starts) for index in range(width)}


def test_a_layer_reads_what_another_writes() -> None:
    found, fixed = classes(lambda net, x: net.b(F.silu(net.a(x))), a=nn.Linear(2, 3), b=nn.Linear(3, 4))
    assert found == pairs(("a", "out"), ("b", "in"), width=3)
    assert fixed == {*(("a", "in", i) for i in range(2)), *(("b", "out", i) for i in range(4))}


def test_value_and_gate_of_geglu_go_together() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        value, gate = net.a(x).chunk(2, dim=-1)
        return net.b(value * F.gelu(gate))

    found, _ = classes(forward, a=nn.Linear(2, 6), b=nn.Linear(3, 4))
    assert found == pairs(("a", "out"), ("b", "in"), width=3, offsets={("a", "out"): (0, 3)})


def test_residual_additions_and_group_norms() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.c(x + net.b(net.norm(x)))

    layers = {"a": nn.Conv2d(2, 4, 1), "b": nn.Conv2d(4, 4, 3, padding=1), "c": nn.Conv2d(4, 1, 1), "norm": nn.GroupNorm(2, 4)}
    found, _ = classes(forward, (1, 2, 4, 4), **layers)
    places = [("a", "out"), ("b", "in"), ("b", "out"), ("c", "in"), ("norm", "out")]
    assert found == pairs(*places, width=4)


def test_concatenations_have_offsets() -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.c(torch.cat([net.a(x), F.interpolate(net.b(x), scale_factor=1.0)], dim=1))

    layers = {"a": nn.Conv2d(1, 2, 1), "b": nn.Conv2d(1, 3, 1), "c": nn.Conv2d(5, 1, 1)}
    found, _ = classes(forward, (1, 1, 2, 2), **layers)
    offset = {("c", "in"): (2,)}
    assert found == pairs(("a", "out"), ("c", "in"), width=2) | pairs(("b", "out"), ("c", "in"), width=3, offsets=offset)


def attention(net: Net, x: Tensor) -> Tensor:
    q, k, v = (layer(x).view(1, -1, 2, 3).transpose(1, 2) for layer in (net.q, net.k, net.v))
    return net.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, -1, 6))


def test_attention_has_the_same_channels_in_q_k_v_and_out() -> None:
    layers = {name: nn.Linear(2, 6, bias=False) for name in "qkv"}
    found, _ = classes(attention, (1, 4, 2), **layers, out=nn.Linear(6, 2))
    assert found == pairs(("q", "out"), ("k", "out"), ("v", "out"), ("out", "in"), width=6)


def joint_attention(net: Net, x: Tensor) -> Tensor:
    """Image and text side by side: tokens of two layers each in queries, keys and values."""
    q, k, v = (torch.cat([net.image(x), net.text(x)], dim=1).view(1, -1, 2, 3).transpose(1, 2) for _ in range(3))
    q = net.norm(q) if hasattr(net, "norm") else q
    image = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, -1, 6)[:, :4]
    return net.out(image)


def test_joint_attention_has_the_same_channels_for_all_tokens() -> None:
    layers = {name: nn.Linear(2, 6, bias=False) for name in ("image", "text")}
    found, _ = classes(joint_attention, (1, 4, 2), **layers, out=nn.Linear(6, 2))
    assert found == pairs(("image", "out"), ("text", "out"), ("out", "in"), width=6)


def test_an_rms_norm_of_heads_ties_the_channels_of_each_head_together() -> None:
    layers = {"image": nn.Linear(2, 6), "text": nn.Linear(2, 6), "out": nn.Linear(6, 2)}
    net = Net(joint_attention, **layers, norm=RMSNorm(3, eps=1e-6)).to("meta").eval()
    starts = {(name, side): 1 + 12 * k + 6 * (side == "out") for k, name in enumerate(layers) for side in ("in", "out")}
    (first, second), tied = trace_labels(net, lambda: net(torch.zeros(1, 4, 2, device="meta")), layers, starts)
    labels = join(np.concatenate([first, tied[0]]), np.concatenate([second, tied[1]]), 37)
    channels = labels[starts["image", "out"] :][:6]
    assert len(set(channels.tolist())) == 2 and len(set(channels[:3].tolist())) == len(set(channels[3:].tolist())) == 1
    assert "forward" not in vars(net.norm)


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.b(F.layer_norm(net.a(x), (3,))),
        lambda net, x: net.b(net.a(x) + torch.ones(3, device="meta")),
        lambda net, x: (net.a(x), net.b(net.a(x))),
    ],
    ids=["layer norm", "external values", "output"],
)
def test_what_cannot_lose_a_channel_is_fixed(forward: Callable) -> None:
    found, fixed = classes(forward, a=nn.Linear(2, 3), b=nn.Linear(3, 4))
    assert not found
    assert {("a", "out", 0), ("b", "in", 2)} <= fixed


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda net, x: net.b(net.a(x).softmax(dim=-1)), "the operation softmax on channels cannot be traced"),
        (lambda net, x: net.b(net.a(x).cumsum(dim=-1)), "the operation cumsum on channels cannot be traced"),
        (lambda net, x: F.linear(net.a(x), net.b.weight * 2), "used outside of its layer"),
        (lambda net, x: net.b(torch.einsum("ij->i", net.a(x))), "a product or sum by einsum cannot be traced"),
    ],
)
def test_what_is_not_known_is_refused(forward: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classes(forward, a=nn.Linear(2, 3), b=nn.Linear(3, 4))


def test_mixtures_of_positions_and_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="a layer mixes channels and positions"):
        classes(lambda net, x: net.b(net.a(x).transpose(1, 2)), (1, 4, 2), a=nn.Linear(2, 3), b=nn.Linear(4, 4))
