"""Optimizer state and averaged weights are carried over to the compacted model by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from diffusers_gfprune.pruning.channel_groups import ChannelGroup, trace_channel_groups
from diffusers_gfprune.pruning.compaction import carry_ema, carry_optimizer, compact, plan_compaction
from diffusers_gfprune.pruning.masking import attach, dense_parameters
from diffusers_gfprune.remote.unet_2d_gfpruned import GFPrunedUNet2DModel
from helpers.architectures import BASE, build, random_masks
from helpers.compaction import TO_Q, compacted, head_mask, kept_slice, loss, masked, planned, relative_error, run, traced

# --- optimizer state ---------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, eps=1e-3),
    "adamw-amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, eps=1e-3, amsgrad=True),
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-4, momentum=0.9),
}


def trained(unet: UNet2DModel, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    """Take steps, which also fills the optimizer's state."""
    for step in range(steps):
        optimizer.zero_grad()
        loss(unet, seed=step).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "powers"),
    [
        ("adamw", {"exp_avg": -1, "exp_avg_sq": -2}),
        ("adamw-amsgrad", {"exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2}),
        ("sgd-momentum", {"momentum_buffer": -1}),
    ],
)
def test_optimizer_state_is_sliced_like_the_weights(kind: str, powers: dict[str, int]):
    """Moments of kept channels are carried over, those of queries with the inverse factor; step counts stay."""
    unet = masked({})
    optimizer = OPTIMIZERS[kind](unet.parameters())
    trained(unet, optimizer)
    unet.channel_masks.set({**random_masks(list(traced()), 0), TO_Q: head_mask(2, 0, 2, 2)})
    state = {name: copy.deepcopy(optimizer.state[parameter]) for name, parameter in dense_parameters(unet).items()}
    plan = planned(unet)
    assert plan.factors[f"{TO_Q}.weight"] == 0.5
    small = compact(unet, plan)
    carry_optimizer(optimizer, unet, small, plan)

    parameters = dict(small.named_parameters())
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len(parameters)
    assert all(ours is theirs for ours, theirs in zip(held, parameters.values()))
    assert len(optimizer.state) == len(parameters)
    for name, parameter in parameters.items():
        assert optimizer.state[parameter].keys() == state[name].keys()
        for key, power in powers.items():
            expected = kept_slice(unet, name, state[name][key]) * plan.factors.get(name, 1.0) ** power
            torch.testing.assert_close(optimizer.state[parameter][key], expected, rtol=1e-6, atol=0)
            assert optimizer.state[parameter][key].shape == parameter.shape
        if "step" in state[name]:
            assert optimizer.state[parameter]["step"].item() == 2


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_after_compaction_is_the_step_before_it(kind: str):
    """Pruning, then training equals training, then pruning, where no query is rescaled."""
    whole_attention = {group.name: torch.ones(group.num_units) for group in traced() if group.attention is not None}
    unet = masked({})
    optimizer = OPTIMIZERS[kind](unet.parameters())
    trained(unet, optimizer)  # so that channels that are pruned next have moments too
    unet.channel_masks.set({**random_masks(list(traced()), 0), **whole_attention})
    trained(unet, optimizer)
    plan = planned(unet)
    assert not plan.factors
    small = compact(unet, plan)
    twin, twin_optimizer = copy.deepcopy((unet, optimizer))

    carry_optimizer(optimizer, unet, small, plan)
    before = {name: parameter.detach().clone() for name, parameter in small.named_parameters()}
    for model, its_optimizer in ((small, optimizer), (twin, twin_optimizer)):
        its_optimizer.zero_grad()
        loss(model, seed=7).backward()
        its_optimizer.step()
    expected = dict(compacted(twin).named_parameters())
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-5, msg=name)
    moved = torch.cat([(parameter.detach() - before[name]).flatten() for name, parameter in small.named_parameters()])
    assert moved.abs().mean() > 1e-4


def test_param_groups_keep_their_options_and_scheduler():
    """Weight decay by group, and a learning-rate schedule that holds the optimizer, keep working."""
    unet = masked(0)
    named = dense_parameters(unet)
    biases = [parameter for name, parameter in named.items() if name.endswith("bias")]
    weights = [parameter for name, parameter in named.items() if not name.endswith("bias")]
    optimizer = torch.optim.AdamW([{"params": biases, "weight_decay": 0.0}, {"params": weights, "weight_decay": 0.3}], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    trained(unet, optimizer, steps=1)
    scheduler.step()
    plan = planned(unet)
    small = compact(unet, plan)
    carry_optimizer(optimizer, unet, small, plan)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.3]
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(biases), len(weights)]
    assert all(
        small.get_parameter(n) is p
        for (n, _), p in zip([item for item in named.items() if item[0].endswith("bias")], optimizer.param_groups[0]["params"])
    )
    trained(small, optimizer, steps=1)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.025, 0.025]


def test_an_optimizer_without_state_is_carried():
    """Compaction before the first step, as in one-shot pruning."""
    unet = masked(0)
    optimizer = torch.optim.AdamW(unet.parameters())
    plan = planned(unet)
    small = compact(unet, plan)
    carry_optimizer(optimizer, unet, small, plan)
    before = run(small)
    trained(small, optimizer, steps=1)
    assert relative_error(run(small), before) > 1e-4


def _linear_weights(unet: UNet2DModel) -> list[nn.Parameter]:
    return [parameter for parameter in unet.parameters() if parameter.ndim == 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda unet: torch.optim.Adagrad(unet.parameters()), "Adagrad has state 'sum'"),
        (lambda unet: torch.optim.RMSprop(unet.parameters()), "RMSprop has state 'square_avg'"),
        (lambda unet: torch.optim.Adafactor(unet.parameters()), "Adafactor has state"),
        (lambda unet: torch.optim.Adafactor(_linear_weights(unet)), "Adafactor has state"),  # has no state of their shape
    ],
    ids=["adagrad", "rmsprop", "adafactor", "factored-adafactor"],
)
def test_unknown_state_is_refused_and_the_optimizer_left_whole(make: Callable, message: str):
    """How such state scales is not known, and state that is carried wrongly is worse than an error."""
    unet = masked(0)
    optimizer = make(unet)
    trained(unet, optimizer, steps=1)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {parameter: copy.deepcopy(dict(optimizer.state[parameter])) for parameter in held}
    plan = planned(unet)
    small = compact(unet, plan)
    with pytest.raises(ValueError, match=message):
        carry_optimizer(optimizer, unet, small, plan)
    now = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(ours is theirs for ours, theirs in zip(now, held, strict=True))
    assert list(optimizer.state) == held
    for parameter in held:
        assert optimizer.state[parameter].keys() == state[parameter].keys()
        for key, value in state[parameter].items():
            assert torch.equal(torch.as_tensor(optimizer.state[parameter][key]), torch.as_tensor(value))


def test_a_foreign_parameter_is_refused():
    """An optimizer that also trains something else has no place for it in the small model."""
    unet = masked(0)
    other = nn.Parameter(torch.zeros(3, 5))
    optimizer = torch.optim.AdamW([*unet.parameters(), other])
    plan = planned(unet)
    small = compact(unet, plan)
    with pytest.raises(ValueError, match=r"shape \(3, 5\)"):
        carry_optimizer(optimizer, unet, small, plan)
    assert optimizer.param_groups[0]["params"][0] is next(iter(unet.parameters()))
    assert optimizer.param_groups[0]["params"][-1] is other


# --- 8-bit optimizer state ---------------------------------------------------------------------------------------------

WIDE = {"block_out_channels": (32, 64), "attention_head_dim": 8}  # parameters with more than 4,096 elements, and small ones


@pytest.fixture(scope="module")
def bnb():
    """bitsandbytes, where it is installed."""
    return pytest.importorskip("bitsandbytes")


def wide(memory_format: torch.memory_format = torch.contiguous_format) -> tuple[UNet2DModel, list[ChannelGroup]]:
    """A masked model, all masks ones."""
    torch.manual_seed(0)
    unet = UNet2DModel(**{**BASE, **WIDE}).to(memory_format=memory_format)
    groups = trace_channel_groups(unet)
    attach(unet, groups)
    return unet, groups


def moments(state: dict, number: str) -> tuple[Tensor, Tensor]:
    """A moment of an 8-bit optimizer in float32, and the largest error that its codes may have, element by element."""
    from bitsandbytes.functional import dequantize_blockwise

    codes = state[f"state{number}"]
    if codes.dtype == torch.float32:
        return codes, torch.zeros_like(codes)
    qmap, absmax = state[f"qmap{number}"], state[f"absmax{number}"]
    scale = absmax.repeat_interleave(256)[: codes.numel()].view(codes.shape)
    gap = qmap.sort().values.diff().max()
    return dequantize_blockwise(codes, absmax=absmax, code=qmap, blocksize=256), scale * gap / 2


@pytest.mark.parametrize("kind", ["Adam8bit", "AdamW8bit", "PagedAdamW8bit"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
def test_8_bit_state_is_sliced_like_the_weights(bnb, kind: str, memory_format: torch.memory_format):
    """Moments of kept channels, the queries' with the inverse factor, quantised again; small parameters keep float32."""
    unet, groups = wide(memory_format)
    optimizer = getattr(bnb.optim, kind)(unet.parameters(), lr=1e-3)
    trained(unet, optimizer)
    masks = random_masks(groups, 0)
    unet.channel_masks.set(
        {**masks, TO_Q: torch.cat([(torch.arange(8) < width).float() for width in (2, 0, 2, 2, 2, 0, 2, 2)])}
    )
    state = {name: copy.deepcopy(dict(optimizer.state[p])) for name, p in dense_parameters(unet).items()}
    plan = plan_compaction(unet, groups, unet.channel_masks.as_dict())
    assert plan.factors[f"{TO_Q}.weight"] == 0.5
    small = compact(unet, plan)
    carry_optimizer(optimizer, unet, small, plan)
    kinds = set()
    for name, parameter in small.named_parameters():
        carried = optimizer.state[parameter]
        assert carried.keys() == state[name].keys() and carried["step"] == 2
        kinds.add(carried["state1"].dtype)
        for number, power in (("1", -1), ("2", -2)):
            assert carried[f"state{number}"].dtype == state[name][f"state{number}"].dtype
            assert carried[f"state{number}"].shape == parameter.shape
            before, _ = moments(state[name], number)
            expected = kept_slice(unet, name, before, groups) * plan.factors.get(name, 1.0) ** power
            found, error = moments(carried, number)
            # bitsandbytes rounds to the nearest code, or nearly so
            assert ((found - expected).abs() <= error * 1.01).all(), (name, number)
            assert found.abs().max() > 0
    assert kinds == {torch.uint8, torch.float32}


def test_training_goes_on_with_8_bit_state(bnb):
    """A step right after compaction is the step before it, to within the quantisation of the moments."""
    runs = []
    for _ in range(2):  # the optimizer cannot be copied
        unet, groups = wide()
        optimizer = bnb.optim.AdamW8bit(unet.parameters(), lr=1e-3, eps=1e-3, weight_decay=0.0)
        trained(unet, optimizer)
        whole_attention = {group.name: torch.ones(group.num_units) for group in groups if group.attention is not None}
        unet.channel_masks.set({**random_masks(groups, 0), **whole_attention})
        trained(unet, optimizer)
        runs.append((unet, optimizer))
    (unet, optimizer), (twin, twin_optimizer) = runs
    plan = plan_compaction(unet, groups, unet.channel_masks.as_dict())
    small = compact(unet, plan)
    carry_optimizer(optimizer, unet, small, plan)
    before = {name: parameter.detach().clone() for name, parameter in small.named_parameters()}
    for model, its_optimizer in ((small, optimizer), (twin, twin_optimizer)):
        its_optimizer.zero_grad()
        loss(model, seed=7).backward()
        its_optimizer.step()
    expected = dict(compact(twin, plan).named_parameters())
    moved = torch.cat([(parameter - before[name]).flatten() for name, parameter in small.named_parameters()])
    away = torch.cat([(parameter - expected[name]).flatten() for name, parameter in small.named_parameters()])
    assert moved.abs().mean() > 1e-4
    assert away.norm() < 0.05 * moved.norm()


def test_8_bit_state_that_is_not_adams_is_refused(bnb):
    """Lion's moment is called alike, but how it goes with the weights is not known here."""
    unet, groups = wide()
    optimizer = bnb.optim.Lion8bit(unet.parameters(), lr=1e-3)
    trained(unet, optimizer, steps=1)
    plan = plan_compaction(unet, groups, random_masks(groups, 0))
    with pytest.raises(ValueError, match="Lion8bit has state 'state1', which cannot be compacted"):
        carry_optimizer(optimizer, unet, compact(unet, plan), plan)
    assert optimizer.param_groups[0]["params"][0] is next(iter(unet.parameters()))


# --- averaged weights --------------------------------------------------------------------------------------------------


def test_ema_is_carried_by_name():
    """The carried average is what compacting a model with the averaged weights gives, and it continues to average."""
    unet = masked(0)
    ema = EMAModel(unet.parameters(), decay=0.5, min_decay=0.5)
    with torch.no_grad():
        for shadow in ema.shadow_params:
            shadow.add_(torch.randn(shadow.shape))
    averaged = copy.deepcopy(unet)
    ema.copy_to(averaged.parameters())
    plan = planned(unet)
    small = compact(unet, plan)
    carry_ema(ema, unet, small, plan)
    expected = dict(compacted(averaged).named_parameters())
    for (name, parameter), shadow in zip(small.named_parameters(), ema.shadow_params, strict=True):
        assert shadow.shape == parameter.shape
        assert torch.equal(shadow, expected[name]), name
    ema.step(small.parameters())
    ema.step(small.parameters())
    ema.copy_to(small.parameters())
    assert torch.isfinite(run(small)).all()


def test_a_carried_average_saves_the_small_model(tmp_path: Path):
    """An average made as `train_unconditional.py` does, with the model's class and config, saves itself."""
    unet = masked(0)
    ema = EMAModel(unet.parameters(), model_cls=UNet2DModel, model_config=unet.config)
    plan = planned(unet)
    small = compact(unet, plan)
    carry_ema(ema, unet, small, plan)
    ema.save_pretrained(tmp_path)
    loaded = GFPrunedUNet2DModel.from_pretrained(tmp_path)
    assert torch.equal(run(loaded), run(small))


@pytest.mark.parametrize("shape", [(1,), (16, 1), (1, 16)], ids=str)
def test_an_average_of_other_shapes_is_refused(shape: tuple[int, ...]):
    """`EMAModel` copies by broadcasting: the model would have one value in all channels."""
    unet = masked(0)
    ema = EMAModel(unet.parameters())
    position = list(dense_parameters(unet)).index("conv_norm_out.weight")
    ema.shadow_params[position] = torch.ones(shape)
    plan = planned(unet)
    small = compact(unet, plan)
    with pytest.raises(ValueError, match="^conv_norm_out.weight has shape .* in ema, and .16,. in the model: ema must be"):
        carry_ema(ema, unet, small, plan)


def test_an_average_of_another_model_is_refused():
    """`EMAModel` matches by position, and would mix up the tensors without a word."""
    unet = masked(0)
    ema = EMAModel(build("two-layers").parameters())
    plan = planned(unet)
    with pytest.raises(ValueError, match="parameters"):
        carry_ema(ema, unet, compact(unet, plan), plan)
