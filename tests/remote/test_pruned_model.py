"""remote/pruned_model.py on every family: features of Diffusers and torch, and files that are not what they should be."""

from __future__ import annotations

import copy
import inspect
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers.training_utils import EMAModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call, grad

from diffusers_gfprune.diffusion.batch import ModelInputs
from diffusers_gfprune.families.lookup import family_of
from helpers.architectures import NoMemory
from helpers.families import BASES, inputs, pruned, run

WEIGHTS = "diffusion_pytorch_model.safetensors"

pytestmark = pytest.mark.parametrize("family", BASES)


def test_ways_of_saving_and_loading(family: str, tmp_path: Path) -> None:
    """Shards, variants, dtypes and copies."""
    small = pruned(family)
    kind, known = type(small), run(small)
    small.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*-of-*.safetensors"))) > 1
    assert torch.equal(run(kind.from_pretrained(tmp_path / "shards")), known)
    small.save_pretrained(tmp_path / "variant", variant="ema")
    assert torch.equal(run(kind.from_pretrained(tmp_path / "variant", variant="ema")), known)
    assert torch.equal(run(copy.deepcopy(small)), known)
    half = kind.from_pretrained(tmp_path / "shards", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and run(half).isfinite().all()
    mapped = kind.from_pretrained(tmp_path / "shards", device_map={"": "cpu"}, disable_mmap=True)
    assert torch.equal(run(mapped), known)


def test_meta_device_context_allocates_nothing(family: str) -> None:
    with torch.device("meta"), NoMemory():
        model = type(pruned(family)).from_config(pruned(family).config)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in pruned(family).named_parameters()}


@pytest.mark.fast_variants(2)
def test_averages_derivatives_and_compilation(family: str) -> None:
    model = copy.deepcopy(pruned(family))
    ema = EMAModel(model.parameters(), model_cls=type(model), model_config=model.config)
    ema.step(model.parameters())
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weights: dict) -> torch.Tensor:
        predict = family_of(model).predict
        return predict(lambda *args, **kwargs: functional_call(model, weights, args, kwargs), inputs(model)).square().mean()

    found = grad(loss)(weights)
    assert all(value.isfinite().all() for value in found.values())
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    predict = family_of(model).predict
    with torch.no_grad():
        torch.testing.assert_close(predict(compiled, inputs(model)), predict(model, inputs(model)), rtol=1e-4, atol=1e-4)


def test_memory_and_layouts(family: str) -> None:
    """Offloading, storage in eight bits, and channels last."""
    known, cpu = run(pruned(family)), torch.device("cpu")
    model = copy.deepcopy(pruned(family))
    if model._supports_group_offloading:  # not in DiTTransformer2DModel
        model.enable_group_offload(onload_device=cpu, offload_type="leaf_level")
        torch.testing.assert_close(run(model), known)
    else:
        with pytest.raises(ValueError, match="does not support group offloading"):
            model.enable_group_offload(onload_device=cpu)
    model = copy.deepcopy(pruned(family))
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert run(model).isfinite().all()
    model = copy.deepcopy(pruned(family)).to(memory_format=torch.channels_last)
    torch.testing.assert_close(run(model), known, rtol=1e-4, atol=1e-4)


class Plain(nn.Module):
    """A model as a function of tensors."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, *conditioning: torch.Tensor) -> torch.Tensor:
        inputs = ModelInputs(sample, timestep, dict(zip(self.names, conditioning)))
        return family_of(self.model).output(self.model, inputs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_exports(family: str) -> None:
    """With a batch of any size, and by the older tracer."""
    model = copy.deepcopy(pruned(family))
    sample, timesteps, conditioning = inputs(model)
    plain, arguments = Plain(model, list(conditioning)).eval(), (sample, timesteps, *conditioning.values())
    batch = torch.export.Dim("batch", min=1, max=16)
    shapes = ({0: batch}, {0: batch}, tuple({0: batch} for _ in conditioning))
    exported = torch.export.export(plain, arguments, dynamic_shapes=shapes).module()
    three = inputs(model, batch_size=3)
    three = (three.sample, three.timesteps, *three.conditioning.values())
    with torch.no_grad():
        for given in (arguments, three):
            torch.testing.assert_close(exported(*given), plain(*given), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.jit.trace(plain, arguments)(*arguments), plain(*arguments))


def test_fresh_weights_are_initialized(family: str) -> None:
    """The model is built without memory first: every weight is drawn afterwards."""
    model = type(pruned(family)).from_config(pruned(family).config)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            bound = module.weight[0].numel() ** -0.5
            assert bound / 4 < module.weight.abs().max() <= bound
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}


def test_broken_files_are_refused(family: str, tmp_path: Path) -> None:
    small = pruned(family)
    small.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = next(name for name in tensors if name.endswith("to_q.weight"))

    def refused(changed: dict, message: str) -> None:
        save_file({**tensors, **changed}, tmp_path / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            type(small).from_pretrained(tmp_path)

    refused({name: tensors[name] * float("nan")}, f"^the weight {name} holds values that are not finite")
    refused({name: tensors[name].int()}, f"^the weight {name} is torch.int32, but must be floating point")
    refused({"other.weight": torch.zeros(1)}, "1 unexpected keys, first other.weight")
    with pytest.raises(ValueError, match="safe_serialization=False"):
        small.save_pretrained(tmp_path, safe_serialization=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "layer_channels": {}}))
    with pytest.raises((ValueError, RuntimeError)):
        type(small).from_pretrained(tmp_path)


NEAR = st.none() | st.integers(-1, 20) | st.floats(-2, 2) | st.text(max_size=3)
ENTRIES = NEAR | st.lists(st.integers(0, 32) | st.lists(st.integers(0, 3), max_size=3), max_size=3)


@pytest.mark.fast_variants(1)
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_value_of_any_field_makes_a_model_or_one_line_that_names_it(family: str, data: st.DataObject) -> None:
    """Before anything is allocated, and a model that is built can be called."""
    kind, (dense, base) = type(pruned(family)), BASES[family]
    owner = family_of(pruned(family))
    limits = sys.modules[type(owner).__module__].LIMITS
    words = st.sampled_from([word for choices in limits.choices.values() for word in choices])
    names = [name for name in inspect.signature(dense.__init__).parameters if name != "self"]
    changes = data.draw(
        st.dictionaries(st.sampled_from(names), ENTRIES | words | st.lists(words, max_size=3), min_size=1, max_size=3)
    )
    try:
        with NoMemory(), torch.device("meta"):
            model = kind(**{**base, **changes})
    except ValueError as error:
        assert "\n" not in str(error) and any(name in str(error) for name in (*changes, "the config describes"))
        return
    size = owner.tracing_size(model.config)
    if sum(parameter.numel() for parameter in model.parameters()) < 10**7:
        prediction = owner.predict(model, owner.example_inputs(model, *size, device="meta"))
        assert prediction.shape == (1, model.config.in_channels, *size)
