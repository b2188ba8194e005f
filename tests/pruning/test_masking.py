"""Masks have no effect while they are ones, lead continuously to the pruned model, and can be removed completely."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from diffusers_gfprune.pruning.channel_groups import trace_channel_groups
from diffusers_gfprune.pruning.masking import (
    ChannelMask,
    attach,
    dense_name,
    dense_parameters,
    detach,
)
from helpers.architectures import ARCHITECTURES, BASE, build, inputs, random_masks
from helpers.compaction import relative_error, traced
from helpers.masking import CONV1, loss_gradients, masked, run

CONTINUITY = ["base", "scale-shift", "three-levels", "one-norm-group", "one-channel-per-norm-group", "heads-of-one-channel"]


# --- invariant 1: attach is free ---------------------------------------------------------------------------------------


@pytest.mark.fast_variants(9)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ones_change_nothing(name: str):
    """A model that is about to be pruned samples as before, bit for bit."""
    unet = build(name)
    before = run(unet)
    attach(unet, traced(name))
    assert torch.equal(run(unet), before)


@pytest.mark.parametrize("name", ["base", "scale-shift", "three-levels", "one-norm-group"])
def test_masked_arithmetic_with_ones_changes_nothing(name: str):
    """The same with the shortcut for all-ones masks off, which otherwise would hide an error of the masks.

    Within the rounding of float32, in which time embeddings are computed: masked weights lie elsewhere in memory, where
    kernels may sum in another order.
    """
    unet, masks = masked(name, seed=None)
    before = run(unet)
    masks._ones = False
    torch.testing.assert_close(run(unet), before, rtol=1e-5, atol=1e-5)


@pytest.mark.fast_variants(9)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_detach_gives_back_the_same_model(name: str):
    """Weights bit for bit, the same parameter objects in the same order, the same classes, and nothing left behind.

    While attached too, parameters keep order and identity: `EMAModel` knows them by position, optimizers by object. Norms
    stay native, with their groups: other ones are slower.
    """
    unet = build(name)
    state = {key: value.clone() for key, value in unet.state_dict().items()}
    parameters = dict(unet.named_parameters())
    classes = {key: type(module) for key, module in unet.named_modules()}
    attributes = {key: set(vars(module)) for key, module in unet.named_modules()}
    groups = {key: module.num_groups for key, module in unet.named_modules() if isinstance(module, nn.GroupNorm)}
    masks = attach(unet, traced(name))
    assert list(dense_parameters(unet)) == list(parameters)
    assert all(now is then for now, then in zip(unet.parameters(), parameters.values(), strict=True))
    masks.set(random_masks(list(traced(name)), seed=0))
    run(unet)
    norms = {key: module for key, module in unet.named_modules() if classes.get(key) is nn.GroupNorm}
    assert {type(norm).forward for norm in norms.values()} == {nn.GroupNorm.forward}
    assert {key: norm.num_groups for key, norm in norms.items()} == groups
    detach(unet)
    assert list(unet.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in unet.state_dict().items())
    assert list(dict(unet.named_parameters())) == list(parameters)
    assert all(parameter is parameters[key] for key, parameter in unet.named_parameters())
    assert {key: type(module) for key, module in unet.named_modules()} == classes
    assert {key: set(vars(module)) for key, module in unet.named_modules()} == attributes


def test_detach_after_training_gives_the_trained_weights_at_dense_outputs():
    """What was trained under masks is what the dense model has, masked channels included."""
    unet, _ = masked()
    loss_gradients(unet)
    torch.optim.SGD(unet.parameters(), lr=1e-3).step()
    trained = {name: parameter.detach().clone() for name, parameter in dense_parameters(unet).items()}
    detach(unet)
    fresh = build()
    fresh.load_state_dict(trained)
    assert torch.equal(run(unet), run(fresh))
    assert not torch.equal(run(unet), run(build()))


def test_detach_without_masks_does_nothing():
    """`detach` may be called twice."""
    unet = build()
    before = run(unet)
    detach(unet)
    assert torch.equal(run(unet), before)


def test_attach_twice_is_refused():
    """Two masks on one weight would multiply."""
    unet, masks = masked()
    before = masks.as_dict()
    with pytest.raises(ValueError, match="already has channel masks"):
        attach(unet, traced())
    assert unet.channel_masks is masks
    assert all(torch.equal(mask, before[name]) for name, mask in masks.as_dict().items())


def test_attach_after_detach_starts_from_ones():
    """A second run on the same model is like the first."""
    unet, _ = masked()
    detach(unet)
    before = run(unet)
    masks = attach(unet, traced())
    assert all(torch.equal(mask, torch.ones_like(mask)) for mask in masks.as_dict().values())
    assert torch.equal(run(unet), before)


# --- parameters while masked -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("conv_in.parametrizations.weight.original", "conv_in.weight"),
        ("down_blocks.0.resnets.0.norm1.parametrizations.bias.original", "down_blocks.0.resnets.0.norm1.bias"),
        ("conv_out.weight", "conv_out.weight"),
    ],
)
def test_dense_name(name: str, expected: str):
    """Everything outside of the package knows parameters by these names."""
    assert dense_name(name) == expected


def test_optimizer_made_before_attach_trains_the_model():
    """`attach` on a run that is under way must not leave the optimizer with orphans."""
    unet = build()
    optimizer = torch.optim.SGD(unet.parameters(), lr=1e-3)
    masks = attach(unet, traced())
    masks.set(random_masks(list(traced()), seed=0))
    before = run(unet)
    gradients = loss_gradients(unet)
    start = {name: parameter.detach().clone() for name, parameter in dense_parameters(unet).items()}
    optimizer.step()
    for name, parameter in dense_parameters(unet).items():
        torch.testing.assert_close(parameter.detach(), start[name] - 1e-3 * gradients[name], msg=name)
    assert relative_error(run(unet), before) > 1e-4


def test_ema_by_position_goes_on_while_masked():
    """An average made of the dense model steps with the masked one, and copies back into the same tensors."""
    unet = build()
    ema = EMAModel(unet.parameters(), decay=0.5, min_decay=0.5)
    ema.step(unet.parameters())  # the first step copies, whatever the decay
    start = {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}
    masks = attach(unet, traced())
    masks.set(random_masks(list(traced()), seed=0))
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(1.0)
    ema.step(unet.parameters())
    ema.copy_to(unet.parameters())
    for name, parameter in dense_parameters(unet).items():
        torch.testing.assert_close(parameter.detach(), start[name] + 0.5, msg=name)


def test_a_masked_channel_gets_no_gradient():
    """At m = 0, producers and norms of the channel see none, and every other channel sees some."""
    unet, masks = masked()
    gradients = loss_gradients(unet)
    for group in traced():
        dead = group.per_channel(masks[group.name]) == 0
        for piece in group.slices:
            if piece.role == "input":
                continue
            along = gradients[piece.name].transpose(0, piece.dim)[list(piece.positions)]  # (num_channels, ...)
            assert (along[dead] == 0).all(), piece
            if piece.parameter == "weight":  # a bias may cancel: that of keys does in the softmax
                assert (along[~dead].reshape(int((~dead).sum()), -1).abs().sum(dim=1) > 0).all(), piece


# --- invariant 4: continuity -------------------------------------------------------------------------------------------


@pytest.mark.fast_variants(4)
@pytest.mark.parametrize("name", CONTINUITY)
@pytest.mark.parametrize("end", ["pruned", "dense"])
def test_masks_are_a_continuous_path(name: str, end: str):
    """p_t -> 0 approaches the pruned model and p_t -> 1 the dense one, with an error that falls as the distance does."""
    unet, masks = masked(name, seed=0)
    binary = masks.as_dict()
    limit = run(unet) if end == "pruned" else run(build(name))
    errors = []
    for distance in (1e-1, 1e-2, 1e-3, 1e-4):
        value = distance if end == "pruned" else 1 - distance
        masks.set({group: torch.where(mask == 1, 1.0, value) for group, mask in binary.items()})
        errors.append(relative_error(run(unet), limit))
    assert errors[2] < 0.02
    assert all(later < earlier / 3 for earlier, later in zip(errors, errors[1:])), errors


# --- execution modes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_equals_eager():
    """Training scripts compile the model: no graph break, the same outputs and gradients, and new masks are seen."""
    torch._dynamo.reset()
    unet = UNet2DModel(**{**BASE, **ARCHITECTURES["one-level"], "mid_block_type": None})  # compiling takes seconds
    groups = trace_channel_groups(unet)
    masks = attach(unet, groups)
    compiled = torch.compile(unet, backend="aot_eager", fullgraph=True)
    for seed in (0, 1):
        masks.set(random_masks(groups, seed))
        expected = unet(**inputs(unet)).sample
        found = compiled(**inputs(unet)).sample
        assert relative_error(found.detach(), expected.detach()) <= 1e-5
        gradients = [torch.autograd.grad(output.square().sum(), list(unet.parameters())) for output in (found, expected)]
        found, expected = (torch.cat([gradient.flatten() for gradient in each]) for each in gradients)
        assert relative_error(found, expected) <= 1e-4


def test_bfloat16_autocast_is_near_float32():
    """Mixed-precision training: masked weights stay exact enough."""
    unet, _ = masked()
    expected = run(unet)
    with torch.autocast("cpu", torch.bfloat16):
        output = run(unet)
        gradients = loss_gradients(unet)
    error = relative_error(output, expected)
    assert 0 < error < 0.05  # 0 would mean that autocast was not on
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


def test_half_precision_weights_are_near_float32():
    """A model cast as a whole, masks included."""
    unet, masks = masked()
    expected = run(unet)
    unet.to(torch.bfloat16)
    arguments = inputs(unet)
    output = unet(arguments["sample"].bfloat16(), arguments["timestep"]).sample
    assert output.dtype == torch.bfloat16
    assert relative_error(output.detach().double(), expected) < 0.1


def test_gradient_checkpointing_gives_the_same_gradients():
    """Activations are computed twice, with the same masks."""
    unet, _ = masked()
    unet.train()
    expected = loss_gradients(unet)
    unet.enable_gradient_checkpointing()
    found = loss_gradients(unet)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_soft_masks_scale_producers_and_leave_readers():
    """w_eff = m * w for what produces a channel; what reads it stays, or the mask would count twice."""
    unet, masks = masked(seed=None)
    weights = {name: parameter.detach().clone() for name, parameter in dense_parameters(unet).items()}
    units = torch.linspace(0.1, 1, 4)
    masks.set({CONV1: units})
    mask = units.repeat_interleave(4)
    resnet = unet.down_blocks[0].resnets[0]
    prefix = "down_blocks.0.resnets.0."
    torch.testing.assert_close(resnet.conv1.weight, weights[prefix + "conv1.weight"] * mask[:, None, None, None])
    torch.testing.assert_close(resnet.conv1.bias, weights[prefix + "conv1.bias"] * mask)
    torch.testing.assert_close(resnet.time_emb_proj.weight, weights[prefix + "time_emb_proj.weight"] * mask[:, None])
    torch.testing.assert_close(resnet.norm2.weight, weights[prefix + "norm2.weight"] * mask)
    assert torch.equal(resnet.conv2.weight, weights[prefix + "conv2.weight"])
    assert torch.equal(unet.conv_in.weight, weights["conv_in.weight"])


def test_a_soft_mask_of_a_unit_is_a_factor_on_gamma_and_beta():
    """It cancels in the norm group's own statistics: were it to count there, training would start from another model."""
    unet, masks = masked(seed=None)
    units = torch.tensor([0.2, 1.0, 0.5, 0.8])
    masks.set({CONV1: units})
    expected = build()
    before = run(expected)
    norm = expected.down_blocks[0].resnets[0].norm2
    with torch.no_grad():
        norm.weight.mul_(units.repeat_interleave(4))
        norm.bias.mul_(units.repeat_interleave(4))
    assert relative_error(run(expected), before) > 1e-2
    assert relative_error(run(unet), run(expected)) < 1e-3 * relative_error(run(expected), before)  # what eps is worth


def test_a_masked_unit_is_zero_and_leaves_others_as_they_are():
    """Zero where it is produced and where it is normalized, and no statistics of other norm groups change."""
    unet, masks = masked(seed=None)
    masks.set({CONV1: torch.tensor([1.0, 0.0, 1.0, 0.0])})
    dead = torch.tensor([False, True, False, True]).repeat_interleave(4)
    found: list[list[Tensor]] = []
    for model in (unet, build()):
        outputs = found.append([]) or found[-1]
        for layer in (model.down_blocks[0].resnets[0].conv1, model.down_blocks[0].resnets[0].norm2):
            layer.register_forward_hook(lambda module, args, output, outputs=outputs: outputs.append(output))
        run(model)
    for output, dense in zip(*found, strict=True):
        assert (output[:, dead] == 0).all()
        torch.testing.assert_close(output[:, ~dead], dense[:, ~dead], rtol=1e-5, atol=1e-5)
        assert (dense[:, dead] != 0).any()


def test_factors_are_worked_out_once_for_masks(monkeypatch):
    """Masks stand for hundreds of training steps, in which each weight is read twice with gradient checkpointing."""
    unet, masks = masked(seed=0)
    calls: Counter = Counter()
    factor = ChannelMask._factor
    monkeypatch.setattr(ChannelMask, "_factor", lambda mask, weight: calls.update([mask]) or factor(mask, weight))
    number = sum(isinstance(module, ChannelMask) for module in unet.modules())
    before = run(unet)
    assert (len(calls), calls.total()) == (number, number)
    assert torch.equal(run(unet), before)
    assert calls.total() == number
    masks.set(random_masks(list(traced()), seed=1))
    assert relative_error(run(unet), before) > 1e-2
    assert calls.total() == 2 * number
