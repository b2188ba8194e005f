"""objectives/objective.py: the terms of the loss, their inputs and their cost."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import HfArgumentParser

from diffusers_gfprune.diffusion.batch import DiffusionBatch
from diffusers_gfprune.diffusion.ddpm import DDPMProcess
from diffusers_gfprune.objectives.objective import NoisePrediction, Objective, ObjectiveArguments
from diffusers_gfprune.pruning.masking import ChannelMasks
from helpers.architectures import BASE, build
from helpers.compaction import compacted, masked, traced
from helpers.processes import ddpm

EVERYTHING = {
    "distillation_weight": 0.5,
    "feature_distillation_weight": 0.1,
    "sensitivity_matching_weight": 0.01,
}
KINDS = [{}, {"distillation_weight": 1.0}, {"feature_distillation_weight": 1.0}, EVERYTHING]


def scheduler(prediction_type: str = "epsilon") -> DDPMProcess:
    """A short one."""
    return ddpm(num_train_timesteps=100, prediction_type=prediction_type)


@functools.lru_cache
def batch(size: int = 4, channels: int = 1, labels: bool = False) -> tuple[DiffusionBatch, Tensor]:
    """A training batch, and directions. Timesteps from 20 on: nearer to 0, matching would be all that counts."""
    generator = torch.Generator().manual_seed(0)
    shape = (size, channels, 8, 8)
    clean, noise = torch.rand(shape, generator=generator) * 2 - 1, torch.randn(shape, generator=generator)
    directions = torch.randn(shape, generator=generator)
    timesteps = torch.randint(20, 100, (size,), generator=generator)
    return DiffusionBatch(clean, noise, timesteps, {"class_labels": torch.arange(size) % 10} if labels else {}), directions


def objective(weights: dict, name: str = "base", masks: ChannelMasks | None = None, **options) -> Objective:
    """With the model of seed 1 as the teacher."""
    masks = masks if masks is not None else ChannelMasks(traced(name))
    arguments = ObjectiveArguments(**{"distillation_weight": 0.0, **weights})
    return Objective(arguments, scheduler(**options), build(name, seed=1), masks)


def student(unet: nn.Module | None = None) -> NoisePrediction:
    """Ready for any objective; the model of seed 0, if none is given."""
    return NoisePrediction(build() if unet is None else unet, features=True)


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


# --- arguments ---


def test_arguments_come_from_the_command_line():
    (parsed,) = HfArgumentParser(ObjectiveArguments).parse_args_into_dataclasses([])
    assert parsed.distillation_weight == 1 and parsed.needs_teacher
    (parsed,) = HfArgumentParser(ObjectiveArguments).parse_args_into_dataclasses(["--distillation_weight", "0"])
    assert not parsed.needs_teacher and not parsed.needs_features and not parsed.needs_directions
    words = ["--sensitivity_matching_weight", "0.05", "--jacobian_step", "0.02"]
    (parsed,) = HfArgumentParser(ObjectiveArguments).parse_args_into_dataclasses(words)
    assert parsed.needs_teacher and parsed.needs_directions and not parsed.needs_features
    assert parsed.jacobian_step == 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distillation_weight": 1.5}, r"distillation_weight=1.5 must be in \[0, 1\]"),
        ({"distillation_weight": float("nan")}, "distillation_weight=nan"),
        ({"feature_distillation_weight": -0.1}, "feature_distillation_weight=-0.1 must be at least 0 and finite"),
        ({"sensitivity_matching_weight": float("inf")}, "sensitivity_matching_weight=inf"),
        ({"sensitivity_matching_weight": float("nan")}, "sensitivity_matching_weight=nan"),
        ({"sensitivity_matching_weight": 1, "jacobian_step": 0.0}, "jacobian_step=0.0 must be greater than 0"),
        ({"jacobian_step": 0.1}, "jacobian_step=0.1 needs sensitivity_matching_weight"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveArguments(**arguments)


# --- what the loss is ---


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_loss_is_between_noise_and_teacher(prediction_type):
    (data, _), schedule = batch(), scheduler(prediction_type)
    noisy = schedule.add_noise(data.clean, data.noise, data.timesteps)
    with torch.no_grad():
        own, theirs = (build(seed=seed)(noisy, data.timesteps).sample for seed in (0, 1))
    noise = mse_loss(own, data.target(schedule))
    for weight in (0.0, 0.25, 1.0):
        loss, terms, _ = objective({"distillation_weight": weight}, prediction_type=prediction_type)(student(), data)
        torch.testing.assert_close(loss, (1 - weight) * noise + weight * mse_loss(own, theirs))
        torch.testing.assert_close(terms["noise"], noise)
        assert set(terms) == ({"noise", "distillation"} if weight else {"noise"})


def test_loss_is_the_weighted_sum_of_its_terms():
    loss, terms, _ = objective(EVERYTHING)(student(), *batch())
    weights = {"noise": 0.5, "distillation": 0.5, "features": 0.1, "sensitivity": 0.01}
    assert set(terms) == set(weights) and all(term > 0 and not term.requires_grad for term in terms.values())
    torch.testing.assert_close(loss.detach(), sum(weights[name] * terms[name] for name in weights))
    assert loss.dtype == torch.float32 and loss.shape == ()


def test_weights_of_images_are_in_all_terms():
    """A weight for one image alone leaves its share of the loss."""
    (data, directions), model, found = batch(), student(), objective(EVERYTHING)
    whole, total = found(model, data, directions), 0.0
    for index in range(len(data)):
        alone = found(model, data, directions, torch.arange(len(data)) == index)
        first = DiffusionBatch(*(tensor[index : index + 1] for tensor in data.tensors()))
        expected = found(model, first, directions[index : index + 1])
        for name, term in alone.terms.items():
            torch.testing.assert_close(term, expected.terms[name] / len(data), msg=lambda text, name=name: f"{name}: {text}")
        total += alone.loss.detach()
    torch.testing.assert_close(total, whole.loss.detach())
    torch.testing.assert_close(found(model, data, directions, torch.ones(len(data))).loss, whole.loss)


@pytest.mark.parametrize("snr_gamma", [None, 5.0])
@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_squares_are_those_of_gradients_of_the_output(weight, snr_gamma):
    """Up to a common factor, where either the noise or the teacher is the target; errors are added where both are."""
    (data, _), model, outputs = batch(), student(), []
    model.unet.register_forward_hook(lambda module, args, output: outputs.append(output.sample))
    found = objective({"distillation_weight": weight, "snr_gamma": snr_gamma})
    loss, _, squares = found(model, data)
    assert squares.shape == (len(data),) and not squares.requires_grad
    if weight in (0.0, 1.0):
        (gradient,) = torch.autograd.grad(loss, outputs[0])
        ratios = gradient.square().flatten(1).sum(dim=1) / squares
        torch.testing.assert_close(ratios, ratios[:1].expand(len(data)), rtol=1e-3, atol=0)
    else:
        ends = (objective({"distillation_weight": end, "snr_gamma": snr_gamma})(model, data).squares for end in (0.0, 1.0))
        torch.testing.assert_close(squares, torch.stack([*ends]).T @ torch.tensor([1 - weight, weight]))


@pytest.mark.parametrize("name", ["base", "rgb", "class-embedding"])
def test_student_that_is_the_teacher_has_only_noise_to_learn(name):
    data = batch(channels=3 if name == "rgb" else 1, labels=name == "class-embedding")
    loss, terms, _ = objective(EVERYTHING, name)(student(build(name, seed=1)), *data)
    assert [terms[term].item() for term in ("distillation", "features", "sensitivity")] == [0, 0, 0]
    torch.testing.assert_close(loss.detach(), 0.5 * terms["noise"])


def test_student_and_teacher_see_the_same_labels():
    """Those that were dropped included."""
    found, seen = objective(EVERYTHING, "class-embedding"), []
    own = build("class-embedding")
    for unet in (own, found.teacher.unet):
        unet.class_embedding.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0].tolist()))
    data, directions = batch(labels=True)
    found(student(own), replace(data, conditioning={"class_labels": torch.tensor([0, 9, 2, 9])}), directions)
    assert seen == [[0, 9, 2, 9] * 2] * 2


def test_inputs_a_step_away_enter_the_matching_terms_only():
    _, everything, _ = objective(EVERYTHING)(student(), *batch())
    _, plain, _ = objective({"distillation_weight": 0.5, "feature_distillation_weight": 0.1})(student(), *batch())
    for name, term in plain.items():
        torch.testing.assert_close(everything[name], term)


def test_terms_without_a_weight_stay_out_of_the_loss():
    weights = {"distillation_weight": 1.0, "sensitivity_matching_weight": 0.1}
    loss, terms, _ = objective(weights)(student(), *batch())
    assert "noise" in terms
    torch.testing.assert_close(loss.detach(), terms["distillation"] + 0.1 * terms["sensitivity"])


def test_compacted_student_has_the_loss_of_the_masked_one():
    unet = masked(0)
    found = objective(EVERYTHING, masks=unet.channel_masks)
    _, before, _ = found(student(unet), *batch())
    _, after, _ = found(student(compacted(unet)), *batch())
    assert before["features"] > 0.01
    for name, term in before.items():
        torch.testing.assert_close(after[name], term, rtol=2e-3, atol=1e-6)


def test_loss_of_a_batch_is_the_mean_over_its_parts():
    parts = zip(*(part.split(2) for part in batch()))
    whole, *halves = (objective(EVERYTHING)(student(), *data)[0].detach() for data in (batch(), *parts))
    torch.testing.assert_close(whole, sum(halves) / 2, rtol=1e-4, atol=0)


# --- gradients, precision, wrappers ---


@pytest.mark.parametrize("weights", KINDS)
def test_every_parameter_of_the_student_gets_a_gradient_and_none_of_the_teachers(weights):
    found, model = objective(weights), student()
    found(model.train(), *batch())[0].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert sum(parameter.grad.abs().sum() for parameter in model.parameters()) > 0
    assert found.arguments.needs_teacher == bool(weights)
    if weights:
        assert not any(p.requires_grad or p.grad is not None for p in found.teacher.parameters())
        assert not any(module.training for module in found.teacher.modules())


def test_gradient_of_every_term_is_that_of_finite_differences():
    found, model = objective(EVERYTHING), student()
    weight = model.unet.mid_block.resnets[0].conv1.weight
    found(model, *batch())[0].backward()
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    slope, values = (weight.grad * direction).sum(), []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * 1e-3 * direction)
            values.append(found(model, *batch())[0])
            weight.sub_(sign * 1e-3 * direction)
    torch.testing.assert_close((values[0] - values[1]) / 2e-3, slope, rtol=0.02, atol=0)


def test_bfloat16_is_near_float32():
    full, *_ = objective({"distillation_weight": 0.5, "feature_distillation_weight": 0.1})(student(), *batch())
    model = student()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, *_ = objective({"distillation_weight": 0.5, "feature_distillation_weight": 0.1})(model, *batch())
        everything, terms, _ = objective(EVERYTHING)(model, *batch())
    assert half.dtype == everything.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.03, atol=0)
    everything.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_gradient_checkpointing_changes_nothing():
    plain, frugal = student(), student()
    frugal.unet.enable_gradient_checkpointing()
    pairs = [(loss, model) for model in (plain, frugal) for loss in [objective(EVERYTHING)(model.train(), *batch())[0]]]
    torch.testing.assert_close(pairs[1][0], pairs[0][0])
    for before, after in zip(*(gradients(*pair) for pair in pairs)):
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)


def test_channels_last_changes_nothing():
    last = student(build().to(memory_format=torch.channels_last))
    data, directions = batch()
    data = data.to(torch.device("cpu"), memory_format=torch.channels_last)
    assert data.noise.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(objective(EVERYTHING)(last, data, directions)[0], objective(EVERYTHING)(student(), *batch())[0])


@pytest.mark.slow
def test_compiling_changes_nothing():
    model, expected = student(build("no-mid-block")), {}
    wrapped = torch.compile(model, backend="eager", fullgraph=True)
    # Without block outputs and with them, back and forth: hooks must not go stale.
    for kind in (0, 1, 0, 1):
        found = objective({"feature_distillation_weight": kind}, "no-mid-block")
        expected.setdefault(kind, found(model, *batch())[0].detach())
        torch.testing.assert_close(found(wrapped, *batch())[0].detach(), expected[kind])
    torch._dynamo.reset()


def test_all_terms_work_under_distributed_data_parallel(tmp_path):
    model = student().train()
    loss = objective(EVERYTHING)(model, *batch())[0]
    expected = gradients(loss, model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # the second forward is refused if a gradient of the first is missing
            model.zero_grad()
            objective(EVERYTHING)(wrapped, *batch())[0].backward()
    finally:
        torch.distributed.destroy_process_group()
    for parameter, gradient in zip(model.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_the_same_on_both_ends_of_a_step(checkpointing):
    unet = UNet2DModel(**BASE, dropout=0.3).train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    model, (data, _) = NoisePrediction(unet), batch()
    twice = [torch.cat([values, values]) for values in (data.clean, data.timesteps)]
    first, second = model(*twice).chunk(2)
    assert not torch.equal(first, second)
    first, second = model(*twice, pairs=True).chunk(2)
    assert torch.equal(first, second)
    assert not torch.equal(first, model(*twice, pairs=True)[: len(first)])  # it is still drawn anew
    (first - second).square().sum().backward()  # ... and not once more for a checkpoint
    assert all(not parameter.grad.any() for parameter in model.parameters())
    assert torch.equal(*model.eval()(*twice, pairs=True).chunk(2))


def test_dropout_does_not_drown_responses():
    unet = UNet2DModel(**BASE, dropout=0.1)
    found = Objective(ObjectiveArguments(sensitivity_matching_weight=1.0), scheduler(), copy.deepcopy(unet))
    _, off, _ = found(NoisePrediction(unet.eval()), *batch())
    _, on, _ = found(NoisePrediction(unet.train()), *batch())
    assert off["sensitivity"] == 0
    assert 0 < on["sensitivity"] < 1  # with different masks, the ends would differ by far more than the step


class NoSynchronization(TorchDispatchMode):
    """Fails on what waits for a GPU: reading a value, or a shape that depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.name() not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("compact", [False, True])
def test_nothing_is_synchronized(compact):
    unet = masked(0)
    model = student(compacted(unet) if compact else unet)
    found = objective(EVERYTHING, masks=unet.channel_masks)
    found(model, *batch())  # kept channels are listed once
    with NoSynchronization():
        loss, *_ = found(model, *batch())
    assert loss.isfinite()


# --- what it needs, and what it costs ---


def test_what_is_missing_is_said():
    with pytest.raises(ValueError, match="teacher=None"):
        Objective(ObjectiveArguments(distillation_weight=1.0), scheduler())
    with pytest.raises(ValueError, match="channel_masks=None"):
        Objective(ObjectiveArguments(feature_distillation_weight=1.0), scheduler(), build())
    with pytest.raises(ValueError, match="directions=None"):
        objective({"sensitivity_matching_weight": 1.0})(student(), batch()[0])
    with pytest.raises(ValueError, match=r"needs NoisePrediction\(unet, features=True\)"):
        objective({"feature_distillation_weight": 1.0})(NoisePrediction(build()), *batch())


def test_without_a_teacher_none_is_kept():
    assert objective({}).teacher is None
    alone = Objective(ObjectiveArguments(distillation_weight=0.0), scheduler())
    assert alone(NoisePrediction(build()), *batch())[0] > 0.1


@pytest.mark.parametrize("weights", [*KINDS, {"sensitivity_matching_weight": 1.0}])
def test_extra_forwards_are_those_that_run(weights):
    found, model, rows = objective(weights), student(), {"student": 0, "teacher": 0}

    def count(who: str, module: nn.Module, args: tuple) -> None:
        rows[who] += len(args[0])

    model.register_forward_pre_hook(functools.partial(count, "student"))
    if weights:
        found.teacher.register_forward_pre_hook(functools.partial(count, "teacher"))
    found(model, *batch())
    teacher, extra_student = rows["teacher"] / len(batch()[0]), rows["student"] / len(batch()[0]) - 1
    assert found.arguments.extra_forwards() == teacher + 3 * extra_student
    assert found.arguments.extra_forwards(student_cost=0.5) == teacher + 1.5 * extra_student


def test_wrapper_leaves_the_unet_as_it_is():
    unet = build()
    names, (data, _) = list(unet.state_dict()), batch()
    wrapper = NoisePrediction(unet, features=True)
    assert wrapper.unet is unet and list(unet.state_dict()) == names
    assert list(wrapper.state_dict()) == [f"unet.{name}" for name in names]
    prediction, features = wrapper(data.clean, data.timesteps, return_features=True)
    assert torch.equal(prediction, unet(data.clean, data.timesteps).sample)
    assert torch.equal(prediction, wrapper(data.clean, data.timesteps))
    assert [tuple(output.shape) for output in features.values()] == [
        *((4, 16, 4, 4), (4, 32, 4, 4), (4, 32, 4, 4), (4, 32, 8, 8), (4, 16, 8, 8))
    ]
    # Nothing stays behind, in the wrapper or in copies of the model.
    twin = copy.deepcopy(wrapper)
    twin.unet(data.clean, data.timesteps)
    assert twin.hook_state is not wrapper.hook_state
    for state in (wrapper.hook_state, twin.hook_state):
        assert not state.outputs and not state.features and not state.paired
    assert list(twin(data.clean, data.timesteps, return_features=True)[1]) == list(features)
